"""The user's rows: loaded, renamed, tokenised, fingerprinted. Knows datasets and tokenizers, not what is measured."""

from ..config.compatibility import check_versions

check_versions()
