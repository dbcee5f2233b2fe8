"""What the tests of the store of checkpoints share."""

import asyncio

import fsspec

KEY = "session_train_0/weights/it/3"


def files_of(url):
    """(the file system of a store, where it is in it), beside the code that is tested."""
    return fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)


async def settled(cache):
    """What was discarded is removed."""
    await asyncio.gather(*cache._discards.values())
