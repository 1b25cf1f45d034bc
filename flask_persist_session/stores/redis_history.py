"""The histories of the sessions of a Redis store: a stream for each, whose ids are the numbers of the entries.

Beside it is a sorted set of the latest idempotency keys by the number that was returned for them. Both have the hash tag
of the session, and live as long as its key does: what makes that live longer makes them too::

    persist:web:{3fa}:h:3fa09c…     stream: an entry as d, its time as t
    persist:web:{3fa}:hk:3fa09c…    numbers by key
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..records import LogEntry, is_session_id
from .history import (
    REMEMBERED,
    RESTORED_AT_ONCE,
    HistoryLog,
    another_session,
    behind,
    check_entries,
    check_restored,
    check_room,
    damaged,
    digest_of,
    log_entry,
    no_session,
    span,
)

#: For the store's own scripts: remove the history of the session *id* of a *shard*.
REMOVE = "redis.call('UNLINK', shard .. ':h:' .. id, shard .. ':hk:' .. id)"
#: For the same: let it live as long as the session. An error is none that a save should end half done for: on a node of a
#: cluster from which the slot moves, keys that are not there are refused, and the margin of their lives is a week.
PROLONG = """
  redis.pcall('PEXPIRE', shard .. ':h:' .. id, ARGV[4])
  redis.pcall('PEXPIRE', shard .. ':hk:' .. id, ARGV[4])
"""

# What scripts share whose first key is that of a session. An entry is never removed but with all others, so there are as
# many as the number of the last one says. Whether a session has ended, its facts tell in their 21st byte, and when it was
# created in the eight from the 9th on. The clock goes on between two looks at it, so lives that differ by less than a
# second are the same; the margin is a week.
_FACTS = """
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local facts = redis.call('HGET', KEYS[1], 'facts')
if not facts and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('the hash of the session is not complete')
end
local function began(moment)
  return moment == '' or struct.unpack('<d', facts, 9) == struct.unpack('<d', moment)
end
"""
_LOG = f"""{_FACTS}
local log, keys = shard .. ':h:' .. id, shard .. ':hk:' .. id
local last = redis.call('XLEN', log)
local function live_as_long(key)
  local session, own = redis.call('PTTL', KEYS[1]), redis.call('PTTL', key)
  if session < 0 then
    redis.call('PERSIST', key)
  elseif own < 0 or own + 1000 < session then
    redis.call('PEXPIRE', key, session)
  end
end
local function add(seq, created_at, data)
  redis.call('XADD', log, seq .. '-0', 't', created_at, 'd', data)
end
"""

# KEYS: session. ARGV: time, expected number, most, digest of the key, when the session began, all but the first perhaps
# empty; entries. Answers what came of it and the last number.
_APPEND = f"""{_LOG}
if not facts then
  return {{'missing', 0}}
end
if not began(ARGV[5]) then
  return {{'another', 0}}
end
if facts:byte(21) == 1 then
  return {{'ended', 0}}
end
local digest, count = ARGV[4], #ARGV - 5
local known = digest ~= '' and redis.call('ZSCORE', keys, digest)
if known then
  return {{'stored', tonumber(known)}}
end
if ARGV[2] ~= '' and ARGV[2] ~= tostring(last) or ARGV[3] ~= '' and last + count > tonumber(ARGV[3]) then
  return {{'refused', last}}
end
if count == 0 then
  return {{'stored', last}}
end
for number = 1, count do
  add(last + number, ARGV[1], ARGV[5 + number])
end
live_as_long(log)
if digest ~= '' then
  redis.call('ZADD', keys, last + count, digest)
  redis.call('ZREMRANGEBYRANK', keys, 0, -1 - {REMEMBERED})
  live_as_long(keys)
end
return {{'stored', last + count}}
"""

# KEYS: session. ARGV: number of the first entry, time and data of each. Answers the last number there was, how many were
# stored; a negative one where there is no session.
_RESTORE = f"""{_LOG}
if not facts then
  return {{-1, 0}}
end
local first, stored = tonumber(ARGV[1]), 0
if first and first <= last + 1 then
  for place = 2, #ARGV, 2 do
    local seq = first + place / 2 - 1
    if seq > last then
      add(string.format('%.0f', seq), ARGV[place], ARGV[place + 1])
      stored = stored + 1
    end
  end
end
if stored > 0 then
  live_as_long(log)
end
return {{last, stored}}
"""

# KEYS: session. Answers whether there were entries.
_REMOVE = f"""
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local there = redis.call('EXISTS', shard .. ':h:' .. id)
{REMOVE}
return there
"""

# KEYS: session. ARGV: when it began. Answers the same; nothing is removed of another one.
_REMOVE_OF = f"""{_FACTS}
if not facts or not began(ARGV[1]) then
  return 0
end
local there = redis.call('EXISTS', shard .. ':h:' .. id)
{REMOVE}
return there
"""


SCRIPTS = (_APPEND, _RESTORE, _REMOVE, _REMOVE_OF)


class RedisHistory(HistoryLog):
    """Keeps the entries of a session in a stream.

    :param client: returns the client of this thread.
    :param run: runs a script, given its number of keys, keys and arguments.
    :param scripts: what *run* takes for each of ``SCRIPTS``.
    :param errors: translates the errors of the driver.
    :param key_of: the key of a session, by id.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        run: Callable[[Any, tuple[Any, ...]], Any],
        scripts: Sequence[Any],
        errors: Callable[[], AbstractContextManager[None]],
        key_of: Callable[[str], str],
    ) -> None:
        self._client = client
        self._run = run
        self._errors = errors
        self._key_of = key_of
        self._append, self._restore, self._remove, self._remove_of = scripts

    def append(
        self,
        session_id: str,
        entries: Sequence[bytes],
        *,
        created_at: float,
        expected_seq: int | None = None,
        key: str | None = None,
        most: int | None = None,
        began: float | None = None,
    ) -> int:
        digest = digest_of(key)
        check_entries(entries, created_at)
        if not is_session_id(session_id):
            raise no_session(session_id)
        given = ("" if option is None else option for option in (expected_seq, most, digest, _packed(began)))
        with self._errors():
            arguments = (1, self._key_of(session_id), repr(float(created_at)), *given, *entries)
            outcome, last = self._run(self._append, arguments)
        if outcome in (b"missing", b"ended"):
            raise no_session(session_id, ended=outcome == b"ended")
        if outcome == b"another":
            raise another_session(session_id)
        if outcome == b"refused":
            check_room(session_id, last, len(entries), expected_seq, most)
        return int(last)

    def read(
        self,
        session_id: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[LogEntry]:
        first, last = span(after, before, limit)
        if not is_session_id(session_id) or first > last:
            return []
        log, count = self._log(session_id), None if limit is None else min(limit, 2**31)
        with self._errors():
            if newest:
                found = list(reversed(self._client().xrevrange(log, last, first, count)))
            else:
                found = self._client().xrange(log, first, last, count)
        return [_entry(session_id, name, fields) for name, fields in found]

    def count(self, session_id: str) -> int:
        if not is_session_id(session_id):
            return 0
        with self._errors():
            return int(self._client().xlen(self._log(session_id)))

    def delete(self, session_id: str, *, began: float | None = None) -> bool:
        if not is_session_id(session_id):
            return False
        with self._errors():
            if began is None:
                return bool(self._run(self._remove, (1, self._key_of(session_id))))
            return bool(self._run(self._remove_of, (1, self._key_of(session_id), _packed(began))))

    def restore(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        check_restored(entries)
        if not is_session_id(session_id):
            raise no_session(session_id)
        stored = 0
        for start in range(0, max(len(entries), 1), RESTORED_AT_ONCE):
            stored += self._restore_part(session_id, entries[start : start + RESTORED_AT_ONCE])
        return stored

    def _restore_part(self, session_id: str, entries: Sequence[LogEntry]) -> int:
        flat = [part for entry in entries for part in (repr(float(entry.created_at)), entry.data)]
        with self._errors():
            arguments = (1, self._key_of(session_id), entries[0].seq if entries else "", *flat)
            last, stored = self._run(self._restore, arguments)
        if last < 0:
            raise no_session(session_id)
        behind(session_id, last, entries)
        return int(stored)

    def _log(self, session_id: str) -> str:
        shard, _, _ = self._key_of(session_id).rpartition(":s:")
        return f"{shard}:h:{session_id}"


def _packed(moment: float | None) -> bytes | None:
    """*moment* as the facts of a session have it."""
    return None if moment is None else struct.pack("<d", moment)


def _entry(session_id: str, name: bytes, fields: dict[bytes, bytes]) -> LogEntry:
    seq = int(name.partition(b"-")[0])
    try:
        return log_entry(session_id, seq, float(fields[b"t"]), fields[b"d"])
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(session_id, seq) from error
