"""The `irc` command. Modules here import torch only inside the commands, so that `--help` is quick."""
