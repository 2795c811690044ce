"""Which changes are asked about twice."""

import time

import pytest

from databases.sql import losses

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("drop table orders;", ["DROP TABLE"]),
        ("ALTER TABLE orders DROP COLUMN note", ["DROP COLUMN"]),
        ("DROP", ["DROP"]),
        ("TRUNCATE orders; TRUNCATE customers; DELETE FROM logs", ["TRUNCATE", "DELETE FROM"]),
        ("delete -- all of it\nfrom orders", ["DELETE FROM"]),
        ("WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone", ["DELETE FROM"]),
        ("DO $$ BEGIN DROP TABLE orders; END $$", ["DROP TABLE"]),
        ("DO $body$ BEGIN EXECUTE $a$ TRUNCATE orders $a$; END $body$", ["TRUNCATE"]),
        # Where a backslash means nothing, this text has ended before the DROP.
        (r"INSERT INTO paths VALUES ('C:\'); DROP TABLE orders; --')", ["DROP TABLE"]),
        ("COMMENT ON TABLE orders IS $$it's$$; DROP TABLE orders; SELECT 'all'", ["DROP TABLE"]),
        ("DO $$ BEGIN RAISE NOTICE 'a -- b'; DELETE FROM orders; END $$", ["DELETE FROM"]),
    ],
)
def test_what_destroys_something(sql, found):
    assert losses(sql) == found


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "CREATE TABLE orders (customer bigint REFERENCES customers ON DELETE CASCADE)",
        "ALTER TABLE orders ADD COLUMN drop_off text",
        "INSERT INTO notes VALUES ('drop table orders')",
        "-- DROP TABLE orders\nSELECT 1 /* TRUNCATE orders */",
        'ALTER TABLE "drop" RENAME TO "truncate"',
        "$1 $ $$ $",
        r"""INSERT INTO t VALUES ('{"text": "one\ntwo"}')""",
        r'CREATE TABLE "a\b" (id int)',
        r"""DO $$ BEGIN PERFORM regexp_replace('a', '^"\d+"$', 'x'); END $$""",
        "SELECT 'not ended",
        "/* nor this: DROP TABLE orders",
    ],
)
def test_what_does_not(sql):
    assert losses(sql) == []


@pytest.mark.parametrize(
    "piece",
    ["$a{0}$ ", "/*", "'", '"', "\\", "-- ", "DROP ", "$$", "E'\\'", "*/", "/* */"],
    ids=lambda piece: piece.strip(),
)
def test_whatever_is_typed_it_answers_at_once(piece):
    sql = "".join(piece.format(number) for number in range(100_000 // len(piece)))
    nested = sql + " ".join(reversed(sql.split()))
    started = time.process_time()
    losses(sql)
    losses(nested)
    # Half a second on a slow machine; one that looks at the rest again for each piece takes minutes.
    assert time.process_time() - started < 10
