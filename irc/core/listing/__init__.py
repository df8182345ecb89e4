"""How a program is written as text. Reading it back, which makes programs, is `irc.core.text`."""
