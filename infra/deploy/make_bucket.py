"""Make an S3 bucket where there is none: `python make_bucket.py NAME`; keys by environment."""

from __future__ import annotations

import sys
from typing import Any


def make_bucket(client: Any, name: str) -> str:
    """Make the bucket `name` unless it is there; what was done, in words.

    Args:
        client: of botocore, for S3.
    """
    if name in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        return f"bucket {name} is there"
    client.create_bucket(Bucket=name)
    return f"made bucket {name}"


if __name__ == "__main__":
    from botocore.session import get_session

    print(make_bucket(get_session().create_client("s3"), sys.argv[1]))
