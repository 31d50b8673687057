"""The check of a device: everything that only a card can tell, in one command whose archive is sent back.

`plan` lists the steps, `runner` runs each in a process of its own, `steps/` holds what they do, `page` and `archive` are what
comes out. Of these only the steps import torch: where it cannot be imported, that is what the report says.
"""
