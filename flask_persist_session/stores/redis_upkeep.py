"""Looks after the keys of a Redis store while the application goes on.

Each session is looked at by a script together with all that leads to it, in one step of the server, so nothing of what
others are doing is seen half done. Keys are met by ``SCAN``, a few at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from ..exceptions import SerializationError
from ..records import Finding, SessionRecord, is_session_id

_PAGE = 200
#: How many keys the server looks at in one step.
_KEYS_AT_ONCE = 500
#: An index of so many entries is gone through in one step, which takes less than a millisecond.
_AT_ONCE = 1500

# What a script may find a key to be instead of the one it looks for, renamed so that it can be made anew.
_ASIDE = """
local function in_the_way(key, kind)
  local found = redis.call('TYPE', key).ok
  return found ~= 'none' and found ~= kind
end
local function put_aside(key, kind)
  if in_the_way(key, kind) then
    local shard = KEYS[1]:match('^(.*):s:')
    redis.call('RENAME', key, shard .. ':damaged:' .. key:sub(#shard + 2))
  end
end
"""

# KEYS: session. Answers its record, its version, and whether all that leads to it agrees with it: 0 or 1, for the expiry,
# the facts and the user each.
LOOK = f"""{_ASIDE}
if in_the_way(KEYS[1], 'hash') then
  return redis.error_reply('the key does not hold a hash')
end
local stored = redis.call('HMGET', KEYS[1], 'record', 'version', 'facts')
local facts = stored[3]
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local intact, expires_at, created_at, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts or '')
if not intact then
  return {{stored[1], stored[2], false, 0, 0, 0}}
end
local function score(key)
  local found = redis.pcall('ZSCORE', key, id)
  return type(found) == 'string' and tonumber(found)
end
local noted = redis.pcall('HGET', shard .. ':facts', id)
return {{stored[1], stored[2], facts, score(shard .. ':expiry') == expires_at and 1 or 0, noted == facts and 1 or 0,
  (user == '' or score(shard .. ':u' .. user) == created_at) and 1 or 0}}
"""

# KEYS: session. ARGV: the version that was seen, its facts, time to live of the indexes in milliseconds. Makes anew all
# that leads to it, unless it has changed since. Answers whether it was still of that version.
REINDEX = f"""{_ASIDE}
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[1] then
  return 0
end
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local expires_at, created_at, _, _, _, user = struct.unpack('<ddI4BHHc0', ARGV[2])
local function enter(key, moment)
  put_aside(key, 'zset')
  redis.call('ZADD', key, string.format('%.17g', moment), id)
  if redis.call('PTTL', key) < tonumber(ARGV[3]) then
    redis.call('PEXPIRE', key, ARGV[3])
  end
end
redis.call('HSET', KEYS[1], 'facts', ARGV[2])
put_aside(shard .. ':facts', 'hash')
redis.call('HSET', shard .. ':facts', id, ARGV[2])
if redis.call('PTTL', shard .. ':facts') < tonumber(ARGV[3]) then
  redis.call('PEXPIRE', shard .. ':facts', ARGV[3])
end
enter(shard .. ':expiry', expires_at)
if user ~= '' then
  enter(shard .. ':u' .. user, created_at)
end
return 1
"""

# What the next two share: whether an entry of an index leads to no session of that user, and is removed if it is to be.
_STRAY = """
local shard, index = KEYS[1]:match('^(.-{%x%x%x}):(.*)$')
local of_facts = index == 'facts'
local function is_stray(id)
  local session = shard .. ':s:' .. id
  if redis.call('EXISTS', session) == 1 then
    local facts = index:sub(1, 1) == 'u' and redis.pcall('HGET', session, 'facts')
    if type(facts) ~= 'string' then
      return false
    end
    local intact, _, _, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts)
    if not intact or 'u' .. user == index then
      return false
    end
  end
  if ARGV[1] == '1' then
    redis.call(of_facts and 'HDEL' or 'ZREM', KEYS[1], id)
  end
  return true
end
"""

# KEYS: an index. ARGV: 1 to remove them, how many entries are not too many for one step. Answers those that lead to no
# session of that user, nothing if there are too many.
STRAYS = f"""{_STRAY}
local size = redis.call(of_facts and 'HLEN' or 'ZCARD', KEYS[1])
if size > tonumber(ARGV[2]) then
  return false
end
local strays = {{}}
local ids = of_facts and redis.call('HKEYS', KEYS[1]) or redis.call('ZRANGE', KEYS[1], 0, -1)
for _, id in ipairs(ids) do
  if is_stray(id) then
    strays[#strays + 1] = id
  end
end
return strays
"""

# KEYS: an index. ARGV: 1 to remove it, an entry that was there a moment ago. Answers whether it leads to no session.
STRAY = f"""{_STRAY}
local there = redis.call(of_facts and 'HGET' or 'ZSCORE', KEYS[1], ARGV[2])
return there and is_stray(ARGV[2]) and 1 or 0
"""


# KEYS: a part of a history. ARGV: 1 to remove it. Answers whether its session is gone.
HISTORY = """
local shard, id = KEYS[1]:match('^(.-{%x%x%x}):hk?:(.*)$')
if redis.call('EXISTS', shard .. ':s:' .. id) == 1 or redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
if ARGV[1] == '1' then
  redis.call('UNLINK', KEYS[1])
end
return 1
"""


class Server(Protocol):
    """What a check needs of the store."""

    def keys(self, count: int) -> Iterator[str]:
        """All keys of the namespace, in any order, perhaps one twice."""

    def members(self, key: str, count: int) -> Iterator[str]:
        """The members of an index, perhaps one twice."""

    def evaluate(self, script: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to many calls of a script, each with its one key and its arguments; errors are values."""

    def read(self, packed: Any, version: Any) -> SessionRecord | None:
        """The record of a hash."""

    def reindexing(self, record: SessionRecord) -> tuple[Any, ...]:
        """Facts and time to live of a record."""


class RedisCheck:
    """One check of a namespace; see ``SessionStore.check``.

    :param prefix: what stands before the shard in each key.
    """

    def __init__(self, server: Server, prefix: str, *, repair: bool, seen: Callable[[SessionRecord], object]) -> None:
        self._server = server
        self._key = re.compile(
            re.escape(prefix) + r":(?:\{([0-3][0-9a-f]{2})\}:(s:|h:|hk:|u:|expiry$|facts$|damaged:)|lease:|note:)(.*)",
            re.DOTALL,
        )
        self._repair = repair
        self._seen = seen

    def run(self) -> Iterator[Finding]:
        keys = self._server.keys(_KEYS_AT_ONCE)
        while page := list(islice(keys, _PAGE)):
            sessions: list[str] = []
            histories: list[str] = []
            indexes: list[str] = []
            for key in page:
                match = self._key.fullmatch(key)
                shard, kind, rest = match.groups() if match else (None, None, "")
                if match is None or (kind in ("s:", "h:", "hk:") and not (is_session_id(rest) and rest[:3] == shard)):
                    yield Finding(kind="foreign", where=key, text="no store has put it there; it stays")
                elif kind == "s:":
                    sessions.append(key)
                elif kind in ("h:", "hk:"):
                    histories.append(key)
                elif kind in ("u:", "expiry", "facts"):
                    indexes.append(key)
            yield from self._indexes(indexes)
            yield from self._sessions(sessions)
            yield from self._histories(histories)

    # Sessions ---------------------------------------------------------------------------------------------------------

    def _sessions(self, keys: list[str]) -> Iterator[Finding]:
        for key, answer in zip(keys, self._server.evaluate(LOOK, [(key,) for key in keys]), strict=True):
            session_id = key[-67:]
            try:
                record = self._record(answer, session_id)
            except SerializationError as error:
                text = f"{error}; it stays, and counts as corrupt for its user. To remove it, delete the session"
                yield Finding(kind="type" if isinstance(answer, Exception) else "record", where=session_id, text=text)
                continue
            if record is not None:
                self._seen(record)
                yield from self._entries(key, record, answer[2:])

    def _record(self, answer: Any, session_id: str) -> SessionRecord | None:
        if isinstance(answer, Exception):
            raise SerializationError(str(answer))
        record = self._server.read(*answer[:2])
        if record is not None and record.id != session_id:
            raise SerializationError("the record is that of another session")
        return record

    def _entries(self, key: str, record: SessionRecord, found: list[Any]) -> Iterator[Finding]:
        """Whether all that leads to a session does so."""
        arguments = self._server.reindexing(record)
        agrees = dict(zip(("expiry", "facts", "user"), found[1:], strict=True))
        wrong = [name for name, agreed in agrees.items() if not agreed]
        if found[0] != arguments[0]:
            wrong = ["what the session itself says of it"]
        if not wrong:
            return
        repaired = bool(self._repair and self._server.evaluate(REINDEX, [(key, record.version, *arguments)])[0] == 1)
        if repaired or not self._repair:  # else it has changed meanwhile, and made its entries itself
            text = f"not in step with the session: {', '.join(wrong)}; listings, statistics and cleanups may leave it out"
            yield Finding(kind="index", where=record.id, text=text, repaired=repaired)

    # Histories --------------------------------------------------------------------------------------------------------

    def _histories(self, keys: list[str]) -> Iterator[Finding]:
        """Those whose session is gone."""
        calls = [(key, int(self._repair)) for key in keys]
        for key, stray in zip(keys, self._server.evaluate(HISTORY, calls), strict=True):
            if stray == 1:
                text = "a part of the history of a session that is gone"
                yield Finding(kind="leftover", where=key, text=text, repaired=self._repair)

    # Indexes ----------------------------------------------------------------------------------------------------------

    def _indexes(self, keys: list[str]) -> Iterator[Finding]:
        """Entries that lead to no session."""
        calls = [(key, int(self._repair), _AT_ONCE) for key in keys]
        for key, strays in zip(keys, self._server.evaluate(STRAYS, calls), strict=True):
            if isinstance(strays, Exception):
                text = f"{strays}; a repair renames it when it makes the index of a session anew"
                yield Finding(kind="type", where=key, text=text)
                continue
            for session_id in self._strays_of_many(key) if strays is None else map(_text, strays):
                text = f"{key} leads to it, but there is no such session of that user"
                yield Finding(kind="index", where=session_id, text=text, repaired=self._repair)

    def _strays_of_many(self, key: str) -> Iterator[str]:
        """The same for an index of so many entries that one step of the server would take too long."""
        members = self._server.members(key, _KEYS_AT_ONCE)
        while page := list(islice(members, _PAGE)):
            answers = self._server.evaluate(STRAY, [(key, int(self._repair), member) for member in page])
            yield from (member for member, stray in zip(page, answers, strict=True) if stray == 1)


def _text(member: bytes) -> str:
    return member.decode("utf-8", "surrogateescape")
