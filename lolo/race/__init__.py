"""The race: optimizers compared on ten workloads by the time that they take to a target."""
