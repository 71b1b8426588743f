"""The servers that other tests lean on are real, empty at first, and gone afterwards."""

from __future__ import annotations

import asyncio

import pytest

from tests.services.servers import ServerMissing, program

pytestmark = pytest.mark.services


def test_each_database_is_new_and_empty(postgres_server, postgres_url):
    import asyncpg

    async def tables(url: str) -> int:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE a (x int)")
        count = await connection.fetchval(
            "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        )
        await connection.close()
        return count

    assert asyncio.run(tables(postgres_url)) == 1
    assert asyncio.run(tables(postgres_server.database())) == 1


def test_each_bucket_is_new_and_empty(s3_server, s3_bucket):
    client = s3_server.client()
    client.put_object(Bucket=s3_bucket.name, Key="x", Body=b"1")
    assert client.list_objects_v2(Bucket=s3_server.bucket().name)["KeyCount"] == 0
    assert client.get_object(Bucket=s3_bucket.name, Key="x")["Body"].read() == b"1"


def test_missing_program_is_named_with_its_package():
    with pytest.raises(ServerMissing, match=r"no-such-program.*package nosuch.*\.ci/services"):
        program("no-such-program", "nosuch")
