"""Write the report of a run: one HTML page without external files, and one Markdown file.

`run_contents` reads the run. The modules with one section each (`lineage`, `curves`, `quality`, …) turn the contents
into a `document`. The modules `html_page` and `markdown` format the document.
"""
