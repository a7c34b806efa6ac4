"""A store of the other clouds' library on the S3 server of the tests: its requests are real, its dialect is S3's."""

from typing import Any

import obstore.store

from pipeline.store.cloud import CloudStore


class OverS3(CloudStore):
    """Is a CloudStore but for the client; the URL is that of an S3 store."""

    def _open(self, **options: Any) -> obstore.store.S3Store:
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return obstore.store.S3Store(bucket, prefix=prefix, client_options={"allow_http": True}, **options)
