"""Who did what: rows that are only ever added."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, and_, insert, select

from tinkercloud.ledger.records import AuditRecord
from tinkercloud.ledger.schema import audit_log
from tinkercloud.ledger.writer import Transaction


def add(connection: Connection, records: list[AuditRecord]) -> None:
    if records:
        connection.execute(insert(audit_log), [msgspec.structs.asdict(record) for record in records])


def append(transaction: Transaction, records: list[AuditRecord]) -> list[None]:
    """`add` as the ledger's writer calls it."""
    add(transaction.connection, records)
    return [None] * len(records)


def find(connection: Connection, start: float, end: float) -> list[AuditRecord]:
    """What happened in [start, end), oldest first."""
    table = audit_log
    where = and_(table.c.at >= start, table.c.at < end)
    names = AuditRecord.__struct_fields__
    rows = connection.execute(select(*(table.c[name] for name in names)).where(where).order_by(table.c.audit_id))
    return [AuditRecord(**row._mapping) for row in rows]
