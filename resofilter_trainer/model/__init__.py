"""How far one step on one sample moves W_up. Knows torch and models, but no dataset and no file."""

from ..config.compatibility import check_versions

check_versions()
