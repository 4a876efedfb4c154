"""``python -m czii25d`` is the program ``czii25d``."""

from czii25d.pipeline.cli import main

if __name__ == "__main__":
    main()
