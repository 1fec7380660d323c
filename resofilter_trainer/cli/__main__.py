"""`python -m resofilter_trainer.cli`, for launchers that start a module."""

from . import main

if __name__ == "__main__":
    main()
