"""What people want besides sd.py, one subject a module; sd.py needs none of it."""
