"""Sphinx: `make docs` builds the site from these Markdown files, without a network."""

from importlib import metadata

project = "LoLO"
author = "The LoLO developers"
release = metadata.version("lolo")
extensions = ["myst_nb"]  # of MyST Markdown, and notebooks
nb_execution_mode = "off"  # `make notebook` runs them; what they show is stored in them
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"LoLO {release}"
exclude_patterns = ["_build"]
# Links to files of the repository, and to the README's pictures, are for readers of the source.
suppress_warnings = ["myst.xref_missing"]
