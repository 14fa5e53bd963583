"""Runtime: devices, process groups, launching them, versions of the environment, signals."""
