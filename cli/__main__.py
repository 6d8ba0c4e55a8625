"""``python -m twa_merge_cli``, which is also what torchrun starts."""

from .main import main

if __name__ == "__main__":
    main()
