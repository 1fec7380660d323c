"""The user's rows: loaded, renamed, tokenised, fingerprinted. Knows datasets and tokenizers, not what is measured."""
