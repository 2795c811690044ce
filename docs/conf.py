"""How Sphinx makes the pages in this folder into HTML: `make docs`."""

import django
from django.conf import settings

# Enough for the docstrings to be read; the pages' own code is run by tests/docs.
settings.configure(
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django_rq",
        "waffle",
        "jobs",
    ],
    RQ_QUEUES={"default": {"URL": "redis://localhost:6379/0"}},
)
django.setup()

project = "django-selfheal"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["conf.py"]
myst_heading_anchors = 3

nitpicky = True
# Nothing is fetched from other projects: their types are names without a link.
nitpick_ignore_regex = [("py:.*", r"(?!jobs).*")]
# A docstring's `name` is code, as everywhere in this project.
default_role = "code"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "django-selfheal"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_dark_style = "monokai"
