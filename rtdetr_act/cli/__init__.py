"""The command line: `rtdetr-act`. Commands parse, call and print; torch is imported when one of them runs."""
