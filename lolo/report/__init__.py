"""The HTML page about runs, evaluations and studies."""
