"""`python -m rtdetr_act` is `rtdetr-act`."""

from rtdetr_act.cli.main import main

if __name__ == "__main__":
    main()
