"""`lorakit schema`: the JSON Schema of a configuration file, for editors."""

from .output import json_result


def schema() -> None:
    """Print the JSON Schema of configurations.

    Editors complete and check YAML with it.
    """
    from ..train.config_schema import schema as json_schema

    json_result(json_schema())
