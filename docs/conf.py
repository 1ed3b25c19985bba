"""Sphinx: `make docs` builds these pages as a site; they also read well as they are."""

import importlib.metadata

project = "PipeMax"
copyright = "the PipeMax maintainers"
version = release = importlib.metadata.version("pipemax")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "PipeMax"
html_show_sphinx = False
html_copy_source = False
