"""What a command does, in Python: resolve models, data and files by name, then call the rooms below."""
