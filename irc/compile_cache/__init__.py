"""Compiled models kept on disk for the next process that asks for the same: `irc.compile(…, cache=folder)`.

`identity` says what a model is, `sources` which files its code came from, `request` what else decides a compilation,
`entry` finds and keeps, `lookup` is what `irc.compile` calls. Whatever cannot be told for certain is a `Doubt`: such a
compilation is not kept.
"""
