"""`python -m timm_hne COMMAND`."""
from .cli import main

if __name__ == '__main__':
    main()
