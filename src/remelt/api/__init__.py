"""The API: the only place that joins the floors.

Read `options`, `recipes` (text and files to graphs), `opening` (names to opened models), `prepare` (everything up to
the plan), `merging` (running it), `embedding` (the recipe inside its result), `inspection`, `resources`.
"""
