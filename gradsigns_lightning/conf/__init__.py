"""Configuration groups; other projects compose them with `hydra.searchpath=[pkg://gradsigns_lightning.conf]`."""
