"""The command line: `expunge demo | train METHOD | generate | info | check`."""

from expunge.cli.app import main as main
