"""The scripts by which a Redis server looks at sessions and changes them, each in one step; and what they are given.

How the keys are called is told in ``redis``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from ..records import SessionRecord
from ..serializers import dump_tags
from .redis_history import PROLONG, REMOVE, SCRIPTS

#: How many sessions a script saves or deletes at most, without a pause, with how many bytes of data.
_STEPS_AT_ONCE = 200
_BYTES_AT_ONCE = 256 * 1024


class Script:
    """A text for the server to run, and the name under which the server keeps it."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Redis names a script by its SHA-1; nothing is protected by it.
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# The other keys are derived from that of the session: they have its hash tag, so they are in the same slot, and each
# argument less is time saved.

# KEYS: session. ARGV: new version, record, facts, time to live in milliseconds. Most saves leave the expiry as it is, and
# then no index is touched; the facts are the same too as long as the data keeps its size.
_SAVING = f"""
local stored = redis.pcall('HMGET', KEYS[1], 'version', 'facts')
if stored.err or stored[1] ~= tostring(ARGV[1] - 1) then
  return 0
end
if stored[2] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2])
  return 1
end
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2], 'facts', ARGV[3])
redis.call('HSET', shard .. ':facts', id, ARGV[3])
if stored[2] and stored[2]:sub(1, 8) == ARGV[3]:sub(1, 8) then
  return 1
end
local expires_at, created_at, _, _, _, user = struct.unpack('<ddI4BHHc0', ARGV[3])
local indexes = {{shard .. ':expiry', shard .. ':facts'}}
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if stored[1] then{PROLONG}else
  {REMOVE}
end
redis.call('ZADD', indexes[1], string.format('%.17g', expires_at), id)
if user ~= '' then
  indexes[3] = shard .. ':u' .. user
  redis.call('ZADD', indexes[3], string.format('%.17g', created_at), id)
end
for _, index in ipairs(indexes) do
  live_as_long(index, tonumber(ARGV[4]))
end
return 1
"""

# The same for a session that must not be there yet, whatever its version.
_CREATING = _SAVING.replace("stored[1] ~= tostring(ARGV[1] - 1)", "stored[1]", 1)

# Lets an index live as long as a session in it does. By their keys: what is known of their times to live, which nobody else
# changes while the script runs.
_LIVE_AS_LONG = """
local longest = {}
local function live_as_long(index, milliseconds)
  longest[index] = longest[index] or redis.call('PTTL', index)
  if longest[index] < milliseconds then
    redis.call('PEXPIRE', index, milliseconds)
    longest[index] = milliseconds
  end
end
"""

SAVE, CREATE = Script(f"{_LIVE_AS_LONG}{_SAVING}"), Script(f"{_LIVE_AS_LONG}{_CREATING}")

# Takes a session out of everything but its own key; its user is known to the facts alone.
_FORGET = f"""
local shard, id = KEYS[1]:match('^(.*):s:(.*)$')
local facts = redis.call('HGET', shard .. ':facts', id) or ''
local intact, _, _, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts)
if intact then
  redis.call('ZREM', shard .. ':u' .. user, id)
end
redis.call('HDEL', shard .. ':facts', id)
redis.call('ZREM', shard .. ':expiry', id)
{REMOVE}
"""

# KEYS: session. ARGV: expected version or nothing.
DELETE = Script(f"""
local hash = redis.call('TYPE', KEYS[1]).ok == 'hash'
if ARGV[1] ~= '' and (not hash or redis.call('HGET', KEYS[1], 'version') ~= ARGV[1]) then
  return 0
end
{_FORGET}
return redis.call('DEL', KEYS[1])
""")

# KEYS: session, the index that led to it.
PRUNE = Script(f"""
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
{_FORGET}
redis.call('ZREM', KEYS[2], id)
return 1
""")

# KEYS: the sessions of a shard by expiry. ARGV: now, for how many seconds after its expiry a key is there for sure.
# Answers nothing where the facts may not be those of the sessions: one has none or damaged ones, or its key's own time to
# live ended. To ask each session itself would take seven times as long.
STATS = Script("""
local shard = KEYS[1]:match('^(.*):expiry$')
if redis.call('ZCARD', KEYS[1]) ~= redis.call('HLEN', shard .. ':facts') then
  return false
end
local gone_if_before = redis.call('TIME')[1] - ARGV[2]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', gone_if_before)) do
  if redis.call('EXISTS', shard .. ':s:' .. id) == 0 then
    return false
  end
end
local function pairs_of(counts)
  local flat = {}
  for name, count in pairs(counts) do
    flat[#flat + 1] = name
    flat[#flat + 1] = count
  end
  return flat
end
local function add_up()
  local now, unpack = tonumber(ARGV[1]), struct.unpack
  local total, expired, ended, users, bytes = 0, 0, 0, 0, 0
  local oldest, newest = math.huge, -math.huge
  local owners, tenants, tag_sets = {}, {}, {}
  for _, facts in ipairs(redis.call('HVALS', shard .. ':facts')) do
    local expires_at, created_at, size, has_ended, owner, rest = unpack('<ddI4BHc0', facts)
    local tags = facts:sub(rest)
    total, bytes = total + 1, bytes + size
    if has_ended == 1 then
      ended = ended + 1
    elseif expires_at <= now then
      expired = expired + 1
    end
    if created_at < oldest then oldest = created_at end
    if created_at > newest then newest = created_at end
    owners[owner] = (owners[owner] or 0) + 1
    tag_sets[tags] = (tag_sets[tags] or 0) + 1
  end
  for owner, count in pairs(owners) do
    local user, rest = unpack('<Hc0', owner)
    local tenant = owner:sub(rest)
    tenants[tenant] = (tenants[tenant] or 0) + count
    if user ~= '' then users = users + 1 end
  end
  local times = {string.format('%.17g', oldest), string.format('%.17g', newest)}
  return {total, expired, ended, users, bytes, times, pairs_of(tenants), pairs_of(tag_sets)}
end
local intact, sums = pcall(add_up)
return intact and sums
""")

# KEYS: the index of a user. Whether a session has ended, its facts tell in their 21st byte.
OPEN = Script("""
local shard = KEYS[1]:match('^(.-{%x%x%x}):u:')
local open = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local facts = redis.call('HGET', shard .. ':facts', id)
  if not facts or facts:byte(21) ~= 1 then
    local found = redis.pcall('HMGET', shard .. ':s:' .. id, 'record', 'version')
    if not found.err and (found[1] or found[2]) then
      open[#open + 1] = {id, found[1], found[2]}
    end
  end
end
return open
""")

_SCRIPT_OF = {"s": SAVE, "c": CREATE, "d": DELETE}

# KEYS: sessions. ARGV: four for each, as for the scripts above, and at last the letters of these scripts.
_STEPS = f"""{_LIVE_AS_LONG}
local kinds, scripts = ARGV[#ARGV], {{}}
scripts.s = function(KEYS, ARGV) {_SAVING} end
scripts.c = function(KEYS, ARGV) {_CREATING} end
scripts.d = function(KEYS, ARGV) {DELETE.text} end
local function run(number)
  return scripts[kinds:sub(number, number)]({{KEYS[number]}}, {{unpack(ARGV, number * 4 - 3, number * 4)}})
end
"""

# Runs each of the steps, and answers what each says, or what is wrong with its keys: the others are none the worse for it.
EACH = Script(f"""{_STEPS}
local outcomes = {{}}
for number = 1, #KEYS do
  local intact, outcome = pcall(run, number)
  if not intact and type(outcome) == 'string' then outcome = redis.error_reply(outcome) end
  outcomes[number] = outcome
end
return outcomes
""")

# KEYS: sessions of one shard, none of them twice. ARGV: version, record, facts and time to live of each. Answers what
# CREATE says of each, or what is wrong with the index of its user. Most of the time of a short command is that of its call,
# so what can be is done for all of them at once.
CREATE_MANY = Script(f"""{_LIVE_AS_LONG}
local shard, outcomes = KEYS[1]:match('^(.*):s:'), {{}}
-- Fails where an index that all share is damaged, before anything is written.
redis.call('ZCARD', shard .. ':expiry')
redis.call('HLEN', shard .. ':facts')
local none_is_there = redis.call('EXISTS', unpack(KEYS)) == 0
local function is_missing(key)
  return none_is_there or redis.pcall('HGET', key, 'version') == false
end
local function index_by_user(id, user, created_at, milliseconds)
  local index = shard .. ':u' .. user
  local added = redis.pcall('ZADD', index, created_at, id)
  if type(added) == 'table' then return added end
  live_as_long(index, milliseconds)
  return 1
end
local expiry, facts_of, histories, longest_life = {{}}, {{}}, {{}}, 0
for number, key in ipairs(KEYS) do
  outcomes[number] = 0
  if is_missing(key) then
    local id, facts, milliseconds = key:sub(-67), ARGV[number * 4 - 1], tonumber(ARGV[number * 4])
    local expires_at, created_at, _, _, _, user = struct.unpack('<ddI4BHHc0', facts)
    outcomes[number] = user == '' and 1 or index_by_user(id, user, created_at, milliseconds)
    if outcomes[number] == 1 then
      expiry[#expiry + 1], expiry[#expiry + 2] = expires_at, id
      facts_of[#facts_of + 1], facts_of[#facts_of + 2] = id, facts
      histories[#histories + 1], histories[#histories + 2] = shard .. ':h:' .. id, shard .. ':hk:' .. id
      longest_life = math.max(longest_life, milliseconds)
    end
  end
end
if #expiry == 0 then
  return outcomes
end
redis.call('ZADD', shard .. ':expiry', unpack(expiry))
redis.call('HSET', shard .. ':facts', unpack(facts_of))
redis.call('UNLINK', unpack(histories))
live_as_long(shard .. ':expiry', longest_life)
live_as_long(shard .. ':facts', longest_life)
for number, key in ipairs(KEYS) do
  if outcomes[number] == 1 then
    local version, record, facts, milliseconds = unpack(ARGV, number * 4 - 3, number * 4)
    redis.call('HSET', key, 'version', version, 'record', record, 'facts', facts)
    redis.call('PEXPIRE', key, milliseconds)
  end
end
return outcomes
""")

# Runs all of the steps or none. Answers the number of the first session in conflict, or 0. Nothing is written before all is
# known to succeed, for there is no way back. KEYS may name more than the sessions, behind them.
TRANSACTION = Script(f"""{_STEPS}
local function has_version(key, kind, given)
  local stored = redis.pcall('HGET', key, 'version')
  if kind == 'c' then return not stored end
  if kind == 's' then return stored == tostring(given - 1) end
  return given == '' or stored == given
end
for number = 1, #kinds do
  local key, kind, given = KEYS[number], kinds:sub(number, number), ARGV[number * 4 - 3]
  if not has_version(key, kind, given) then return number end
  local shard = key:match('^(.*):s:')
  local facts = kind == 'd' and redis.pcall('HGET', shard .. ':facts', key:match('[^:]*$')) or ARGV[number * 4 - 1]
  if type(facts) == 'table' then return facts end
  local intact, _, _, _, _, _, user = pcall(struct.unpack, '<ddI4BHHc0', facts or '')
  for _, index in ipairs({{shard .. ':expiry', intact and user ~= '' and shard .. ':u' .. user or nil}}) do
    local size = redis.pcall('ZCARD', index)
    if type(size) == 'table' then return size end
  end
  local size = redis.pcall('HLEN', shard .. ':facts')
  if type(size) == 'table' then return size end
end
for number = 1, #kinds do
  run(number)
end
return 0
""")

# KEYS: the index of a user. ARGV: now, the ordering field as its distance from the version in a packed record, "-" for
# descending, offset, limit, value and id of the last one before or nothing, tenant behind a colon or nothing. Answers the
# active sessions of that page, or nothing if one cannot be judged: a record is read from its end, where the times stand
# before two times nothing (it has not ended) and the version, whose length follows from its value.
PAGE_OF_USER = Script("""
local now, distance, descending = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '-'
local shard = KEYS[1]:match('^(.-{%x%x%x}):u:')
local function precedes(one, other)
  if descending then one, other = other, one end
  if one[1] ~= other[1] then return one[1] < other[1] end
  return one[2] < other[2]
end
local function is_active(facts)
  local expires_at, _, _, has_ended, owner = struct.unpack('<ddI4BHc0', facts)
  local _, rest = struct.unpack('<Hc0', owner)
  return has_ended ~= 1 and expires_at > now and (ARGV[8] == '' or owner:sub(rest) == ARGV[8])
end
local function value_in(record, version)
  local number, length = tonumber(version), 1
  if number >= 4294967296 then length = 9
  elseif number >= 65536 then length = 5
  elseif number >= 256 then length = 3
  elseif number >= 128 then length = 2 end
  local start = #record - length + 1 - distance
  assert(record:byte(start) == 203 and record:sub(-length - 2, -length - 1) == '\\192\\192')
  return struct.unpack('>d', record, start + 1)
end
local function active()
  local found, last = {}, ARGV[7] ~= '' and {tonumber(ARGV[6]), ARGV[7]}
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if is_active(redis.call('HGET', shard .. ':facts', id)) then
      local stored = redis.call('HMGET', shard .. ':s:' .. id, 'record', 'version')
      local item = {value_in(stored[1], stored[2]), id, stored}
      if not last or precedes(last, item) then found[#found + 1] = item end
    end
  end
  table.sort(found, precedes)
  return found
end
local intact, found = pcall(active)
if not intact then return false end
local page = {}
for number = ARGV[4] + 1, math.min(ARGV[4] + ARGV[5], #found) do
  page[#page + 1] = found[number][3]
end
return page
""")

# KEYS: lease. ARGV: holder, milliseconds.
LEASE = Script("""
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) == 0 then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

HISTORY_SCRIPTS = tuple(map(Script, SCRIPTS))

#: The keys of a shard, beside that of a session, that scripts write, and must not make anew.
_WRITTEN: dict[Script, tuple[str, ...]] = {
    **dict.fromkeys((SAVE, CREATE), ("expiry", "facts")),
    **dict.fromkeys(HISTORY_SCRIPTS, ("h:{id}", "hk:{id}")),
    DELETE: ("expiry", "facts", "h:{id}", "hk:{id}"),
}


def with_all_keys(script: Script, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a script is given, with the keys named that it derives from its first one.

    While a slot moves to another node of a cluster, a key after the other, a node refuses a script before it begins if it
    has some of the named keys only. The others it would write half, or make anew beside those that are to come.
    """
    number, *given = arguments
    keys, others = given[:number], given[number:]
    if script is TRANSACTION:
        each = zip(others[-1], keys, range(0, 4 * number, 4), strict=True)
        more = [name for kind, key, at in each for name in _written_with(_SCRIPT_OF[kind], key, others[at : at + 4])]
    else:
        more = _written_with(script, keys[0], others)
    named = dict.fromkeys((*keys, *more))
    return len(named), *named, *others


def _written_with(script: Script, key: str, given: Sequence[Any]) -> list[str]:
    """The other keys that *script* writes with that of a session."""
    shard, _, session_id = key.rpartition(":s:")
    names = [name.format(id=session_id) for name in _WRITTEN.get(script, ())]
    if script in (SAVE, CREATE) and (user := _user_in(given[2])):
        names.append(f"u{user}")
    return [f"{shard}:{name}" for name in names]


_FACTS = struct.Struct("<ddIBHH")


def facts_of(record: SessionRecord) -> bytes:
    """What statistics and indexes need of a record, for the scripts to unpack; its expiry comes first.

    Behind the numbers come the lengths of user and tenant together and of the user; user, tenant, tags. Names have a
    colon before them, to tell the empty one from none.
    """
    user = b"" if record.user_id is None else b":" + record.user_id.encode()
    tenant = b"" if record.tenant_id is None else b":" + record.tenant_id.encode()
    owner_size = 2 + len(user) + len(tenant)
    ended, size = record.ended_at is not None, len(record.data)
    numbers = _FACTS.pack(record.expires_at, record.created_at, size, ended, owner_size, len(user))
    return b"".join((numbers, user, tenant, dump_tags(record.tags).encode()))


def _user_in(facts: bytes) -> str:
    """The user, behind a colon, or nothing."""
    *_, size = _FACTS.unpack_from(facts)
    return facts[_FACTS.size : _FACTS.size + size].decode()


# Many at once ---------------------------------------------------------------------------------------------------------

#: A script and its arguments: the number of its keys, the keys, the others.
Call: TypeAlias = "tuple[Script, tuple[Any, ...]]"


class Step(NamedTuple):
    """What a script does with one of several sessions."""

    kind: str
    """The letter of the script."""
    shard: str
    key: str
    arguments: tuple[Any, ...]
    """Four, of which a deletion uses one."""
    size: int
    """Bytes of its data."""


def together(steps: Sequence[Step]) -> tuple[Any, ...]:
    """The arguments of a script that runs these steps."""
    kinds, _, keys, arguments, _ = zip(*steps, strict=True)
    return len(keys), *keys, *chain.from_iterable(arguments), "".join(kinds)


def call_of(steps: Sequence[Step]) -> Call:
    """The script that runs each of these steps, which are of one shard, and its arguments."""
    if len(steps) == 1:
        [step] = steps
        return _SCRIPT_OF[step.kind], (1, step.key, *step.arguments)
    created = {step.key: step.arguments for step in steps if step.kind == "c"}
    if len(created) == len(steps):
        return CREATE_MANY, (len(created), *created, *chain.from_iterable(created.values()))
    return EACH, together(steps)


def at_once(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """Steps that follow each other and are on one server of a cluster, as many as a script may run without a pause."""
    for _, of_shard in groupby(steps, key=attrgetter("shard")):
        yield from parts(of_shard, _STEPS_AT_ONCE, _BYTES_AT_ONCE)


def parts(steps: Iterable[Step], most: int, most_bytes: int) -> Iterator[list[Step]]:
    """Some steps after the other: at most so many, and of so many bytes if there are more than one."""
    part, size = list[Step](), 0
    for step in steps:
        if part and (len(part) == most or size + step.size > most_bytes):
            yield part
            part, size = [], 0
        part.append(step)
        size += step.size
    if part:
        yield part
