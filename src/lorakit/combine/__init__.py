"""Adapters made of adapters."""
