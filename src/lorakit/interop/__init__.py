"""Files that other tools read and write: PEFT adapter directories, both ways, strictly."""
