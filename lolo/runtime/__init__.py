"""What a run runs on: devices, processes, versions, signals."""
