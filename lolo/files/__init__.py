"""Files of every kind: written whole or not at all, checked when they are read, nothing pickled."""
