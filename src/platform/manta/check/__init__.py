"""Rules over specs: each returns findings; none touches a network.

`check.files(paths)` runs them all; `check.RULES` lists them.
"""

from manta.check import (  # noqa: F401  (each registers its rules)
    cluster_machines,
    cluster_security,
    cluster_shape,
    models,
    packages,
    placement,
    reading,
    secrets,
    serve,
    serve_arguments,
    serve_own,
    versions,
)
from manta.check.files import files, project_files
from manta.check.rules import RULES, Rule

__all__ = ["RULES", "Rule", "files", "project_files"]
