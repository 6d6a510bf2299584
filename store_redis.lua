-- The script of store_redis.py: one call is one group of operations of one node, and one atomic step. It is one file
-- of over 500 lines, since Redis runs a script as a whole.
--
-- KEYS are the hash `meta` and a key that is never there: while a cluster moves the slot, Redis then refuses the whole
-- call, so no key comes to be on both sides. ARGV begins with 13 words about the node and its settings, in the order
-- below. Then come the operations, each its name and its arguments. The answer is 'join' if the node is not alive or of
-- another epoch, or if another Redis has taken over: then nothing was done. Otherwise it is the number of the newest
-- entry, and an answer for each operation. 'join' and 'offer' come alone. Times are microseconds of Redis's clock.
--
-- The keys, after the prefix:
--   meta           hash    the single values, and the sums of what dead nodes have counted
--   log            stream  entries <seq>-0 with the fields below
--   for:NAME       list    the numbers of the records for a name of an audience (c:CLIENT, t:TOPIC, u:USER), in order; for:*
--                          of those for everyone, for:- of all that are not replayed
--   old            stream  a log that was given up; its numbers have yet to leave the lists
--   once:KEY       string  the number of the last entry of an append that may be repeated. That entry has the key and,
--                          as its answer, the fingerprint and the reply; the entries before it have '+'
--   nodes, tails   zsets   the living nodes: when the lease ends, and the last number read
--   node:NODE      hash    its counters;  folded:STARTED:NODE  the same, as they were added to the sums
--   members:NODE   set     its clients
--   posts:NODE     stream  messages to it
--   clients        hash    the node of each client;  groups  the groups that it is in, packed
--   group:NODE:NAME    set  its clients in this group: of a topic, of a user or, where limited, of an address
--   dead           set     nodes with clients to remove; these count for nothing, and their ids are free
--   step:PART      hash    by id, changes of the number of clients that are handed the broadcasts behind it; PART is the
--                          beginning of the ids. steps  hash  the sum of each part;  stepped  zset  the parts, in order
--   counted        hash    by id, the clients that a notification was handed to beside that; a:ID  addressed by a farewell
--   bucket:NAME    string  when it is full; expires then
--   bookmarks      hash    by owner (client_id, newline, user), its bookmark: the position and the spans, packed
--   bookmarked     zset    the owners, by the end of their time;  owners  zset  the same in their order
--   revoked        hash    by user, the second up to which tokens are refused;  revocations  zset  the users, numbered
--   offers         hash    records to refill the log with;  offered  zset  their ids, in order
--   parts          hash    the newest record of each node that offers some, and the one it has offered them back to
--   awaited        zset    nodes that may still offer some, and until when they are waited for

local P = ARGV[1]
local epoch = ARGV[2]
local node = ARGV[3]
local tail = tonumber(ARGV[4])
math.randomseed(tonumber(ARGV[5]))
local MAX = tonumber(ARGV[6])
local SIZE = tonumber(ARGV[7])
local BYTES = tonumber(ARGV[8])
local TTL = tonumber(ARGV[9])
local LEASE = tonumber(ARGV[10])
-- How long offers are waited for: where no node is known, and for the next of one node; those of a known node that is
-- missing; and all of them together.
local RESTORE = tonumber(ARGV[11])
local AWAIT, MOST_RESTORE = math.floor(RESTORE * 5 / 3), RESTORE * 40

-- The last argument that was read.
local cursor = 13
local function arg()
  cursor = cursor + 1
  return ARGV[cursor]
end
local function number_arg() return tonumber(arg()) end

local call = redis.call
local META, LOG, NODES, TAILS = P..'meta', P..'log', P..'nodes', P..'tails'
local CLIENTS, GROUPS, DEAD = P..'clients', P..'groups', P..'dead'
local OFFERS, OFFERED, PARTS, AWAITED = P..'offers', P..'offered', P..'parts', P..'awaited'
local NODE, MEMBERS, POSTS = P..'node:', P..'members:', P..'posts:'
local REVOKED, REVOCATIONS = P..'revoked', P..'revocations'
local BOOKMARKS, BOOKMARKED, OWNERS = P..'bookmarks', P..'bookmarked', P..'owners'
local GROUP, BUCKET, ONCE = P..'group:', P..'bucket:', P..'once:'
local STEP, STEPS, STEPPED, COUNTED = P..'step:', P..'steps', P..'stepped', P..'counted'
local FOR, OLD, KINDS = P..'for:', P..'old', {'c:', 't:', 'u:'}

-- Where an entry has the values of its fields: i, t, r, a, p, o, z, w and n.
local ID, AT, REST, AUDIENCE, REPLAYED, KEY, BYTES_OF, ANSWER = 2, 4, 6, 8, 10, 12, 14, 16

-- Clients of the dead that one renewal removes, and records and bytes that one join puts back: milliseconds each.
local REMOVED_AT_ONCE, RESTORED_AT_ONCE, RESTORED_BYTES = 1000, 1000, 1048576
-- The bookmarks that are kept, at most, and for how long; and as in bookmarks.py.
local MOST_BOOKMARKS, BOOKMARK_TTL = tonumber(ARGV[12]), tonumber(ARGV[13])
local FORGOTTEN_AT_ONCE, MOST_SPANS = 1000, 128
-- Records, and names of their audiences, that one call trims beside twice as many as it adds: 3 ms. Names beyond that
-- only for the last record.
local TRIMMED_AT_ONCE, NAMES_AT_ONCE = 300, 1000

local time = call('TIME')
local now = time[1] * 1000000 + time[2]
-- The newest id, the id before the first, the sums of the log, its last number, and the least number of the next entry.
-- Then the records, and the bookmarks, that this call has written.
local newest, before, kept, bytes, seq, least, sent, listed, kept_bookmarks = '', '', 0, 0, 0, 0, 0, 0, 0

local function load()
  local state = call('HMGET', META, 'newest', 'before', 'kept', 'bytes', 'seq', 'least')
  newest, before = state[1], state[2]
  kept, bytes, seq, least = tonumber(state[3]), tonumber(state[4]), tonumber(state[5]), tonumber(state[6] or 0)
end

local function save()
  call('HSET', META, 'newest', newest, 'before', before, 'kept', kept, 'bytes', bytes, 'seq', seq)
end

local function text(integer) return string.format('%.0f', integer) end

-- --- the log

local function next_id(last)
  -- 48 bits of time, then 12 + 14 + 48 random bits with the first 0. They count on where the time does not advance.
  local ms, a, b = math.floor(now / 1000), math.random(0, 2047), math.random(0, 16383)
  local c = math.random(0, 16777215) * 16777216 + math.random(0, 16777215)
  local last_ms = last == '' and 0 or tonumber(last:sub(1, 8)..last:sub(10, 13), 16)
  if ms <= last_ms then
    ms, a, b = last_ms, tonumber(last:sub(16, 18), 16), tonumber(last:sub(20, 23), 16) - 32768
    c = tonumber(last:sub(25), 16) + 1 + math.random(0, 1073741823)
    if c >= 281474976710656 then b, c = b + 1, c - 281474976710656 end
    if b >= 16384 then a, b = a + 1, 0 end
    if a >= 4096 then ms, a = ms + 1, 0 end
  end
  return string.format('%08x-%04x-7%03x-%04x-%04x%08x', math.floor(ms / 65536), ms % 65536, a, b + 32768,
    math.floor(c / 4294967296), c % 4294967296)
end

-- Of the audiences in this call: many notifications in a row have the same.
local names_by_audience = {[''] = {'*'}}

local function names_of(audience, replayed)
  if replayed ~= '1' then return {'-'} end
  local names = names_by_audience[audience]
  if names then return names end
  local unpacked = cmsgpack.unpack(audience)
  names = {}
  for k, kind in ipairs(KINDS) do
    for _, name in ipairs(unpacked[k] or {}) do names[#names + 1] = kind..name end
  end
  names_by_audience[audience] = names
  return names
end

local function up_to(key, last)  -- How many numbers of a list are at most this one.
  local low, high = 0, call('LLEN', key)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tonumber(call('LINDEX', key, middle)) <= last then low = middle + 1 else high = middle end
  end
  return low
end

local function add(id, at, rest, size, audience, replayed, key, answer, addressed)
  newest, seq, bytes = id, math.max(seq + 1, least), bytes + size
  if replayed == '1' then kept = kept + 1 end
  call('XADD', LOG, text(seq)..'-0', 'i', id, 't', at, 'r', rest, 'a', audience, 'p', replayed, 'o', key, 'z', size,
    'w', answer, 'n', addressed or '')
  for _, name in ipairs(names_of(audience, replayed)) do
    call('RPUSH', FOR..name, text(seq))
    listed = listed + 1
  end
  local left = math.ceil((at + TTL - now) / 1000)
  if key ~= '' and left > 0 then call('SET', ONCE..key, text(seq), 'PX', left) end
end

local function number(entry) return tonumber(entry[1]:sub(1, -3)) end

local function floor()  -- The number before the first entry. The lists may have smaller ones, of a log that is gone.
  local first = call('XRANGE', LOG, '-', '+', 'COUNT', 1)[1]
  return first and number(first) - 1 or seq
end

local function id_up_to(last)  -- The id of the last entry up to a number, or `before`.
  -- Redis would look through the whole log for an entry before the first.
  if last <= floor() then return before end
  return call('XREVRANGE', LOG, text(last)..'-0', '-', 'COUNT', 1)[1][2][ID]
end

local function last_up_to(id)  -- The number and the id of the last entry up to an id; floor() and `before` without one.
  local low, high, found = floor(), seq, before
  while low < high do
    -- The ids increase with the numbers; between these there are gaps.
    local middle = math.ceil((low + high) / 2)
    local entry = call('XREVRANGE', LOG, text(middle)..'-0', text(low + 1)..'-0', 'COUNT', 1)[1]
    if not entry then
      low = middle
    elseif entry[2][ID] <= id then
      low, found = middle, entry[2][ID]
    else
      high = number(entry) - 1
    end
  end
  return low, found
end

local function place_of(id)  -- The number of the entry with this id, or of the log's front if that is the id; or nil.
  local number, found = last_up_to(id)
  return found == id and number or nil
end

local function unlist(entry)  -- Take an entry that leaves the log out of the lists; return the number of these.
  local names, last = names_of(entry[2][AUDIENCE], entry[2][REPLAYED]), number(entry)
  for _, name in ipairs(names) do
    -- Nearly always the first number is that of the entry.
    local first
    repeat first = call('LPOP', FOR..name) until not first or tonumber(first) >= last
    if first and tonumber(first) > last then call('LPUSH', FOR..name, first) end
  end
  return #names
end

local function forget(entry)
  local fields = entry[2]
  before, bytes = fields[ID], bytes - fields[BYTES_OF]
  if fields[REPLAYED] == '1' then kept = kept - 1 end
  call('HDEL', COUNTED, before, 'a:'..before)
  local key = fields[KEY]
  if key ~= '' and tonumber(call('GET', ONCE..key) or 0) == number(entry) then call('DEL', ONCE..key) end
  return unlist(entry)
end

local function trim_old()
  local entries = call('XRANGE', OLD, '-', '+', 'COUNT', TRIMMED_AT_ONCE)
  for _, entry in ipairs(entries) do unlist(entry) end
  if #entries == 0 then return end
  call('XTRIM', OLD, 'MINID', '=', text(number(entries[#entries]) + 1)..'-0')
  if call('XLEN', OLD) == 0 then call('UNLINK', OLD) end
end

local function trim()
  local slowest = call('ZRANGE', TAILS, 0, 0, 'WITHSCORES')[2]
  slowest = slowest and tonumber(slowest) or seq
  local from, goes_on = '-', true
  local entries_left, names_left = TRIMMED_AT_ONCE + 2 * sent, NAMES_AT_ONCE + 2 * listed
  while goes_on and entries_left > 0 and names_left > 0 do
    local entries = call('XRANGE', LOG, from, '+', 'COUNT', 20)
    goes_on = #entries == 20
    for _, entry in ipairs(entries) do
      local fits = kept <= SIZE and bytes <= BYTES and tonumber(entry[2][AT]) + TTL >= now
      if fits or number(entry) > slowest then
        goes_on = false
        break
      end
      entries_left, names_left = entries_left - 1, names_left - forget(entry)
      from = text(number(entry) + 1)..'-0'
    end
  end
  if from ~= '-' then
    call('XTRIM', LOG, 'MINID', '=', from)
    save()
  end
end

-- --- the registry

local function is_alive(one) return call('ZSCORE', NODES, one) end

local function living() return call('ZRANGE', NODES, 0, -1) end

local function set_groups(id, owner, packed)
  local group, old = GROUP..owner..':', call('HGET', GROUPS, id)
  if old then
    for _, name in ipairs(cmsgpack.unpack(old)) do call('SREM', group..name, id) end
  end
  if packed ~= '' then
    call('HSET', GROUPS, id, packed)
    for _, name in ipairs(cmsgpack.unpack(packed)) do call('SADD', group..name, id) end
  elseif old then
    call('HDEL', GROUPS, id)
  end
end

local function owner_of(id) return call('HGET', CLIENTS, id) or nil end

local function is_taken(owner) return owner and owner ~= node and is_alive(owner) end

local function remove(id, owner)
  call('SREM', MEMBERS..owner, id)
  if owner_of(id) == owner then
    call('HDEL', CLIENTS, id)
    set_groups(id, owner, '')
  end
end

local function enter(id, owner, groups)
  if owner and owner ~= node then remove(id, owner) end
  call('HSET', CLIENTS, id, node)
  call('SADD', MEMBERS..node, id)
  set_groups(id, node, groups)
end

local function active()
  local count = call('HLEN', CLIENTS)
  for _, dead in ipairs(call('SMEMBERS', DEAD)) do count = count - call('SCARD', MEMBERS..dead) end
  return count
end

local function members(group)
  local count = 0
  for _, one in ipairs(living()) do count = count + call('SCARD', GROUP..one..':'..group) end
  return count
end

local function members_of_any(one, groups)  -- How many clients of a node are in at least one of the groups.
  local largest, size = nil, 0
  for _, name in ipairs(groups) do
    local key = GROUP..one..':'..name
    local members = call('SCARD', key)
    if members > size then largest, size = key, members end
  end
  if not largest then return 0 end
  local seen = {}
  for _, name in ipairs(groups) do
    local key = GROUP..one..':'..name
    for _, id in ipairs(key ~= largest and call('SDIFF', key, largest) or {}) do
      if not seen[id] then seen[id], size = true, size + 1 end
    end
  end
  return size
end

local function recipients(audience)
  if audience == '' then return active() end
  local clients, topics, users = unpack(cmsgpack.unpack(audience))
  local count, groups, wanted = 0, {}, {}
  for _, name in ipairs(topics) do groups[#groups + 1] = 'topic:'..name end
  for _, name in ipairs(users) do groups[#groups + 1] = 'user:'..name end
  for _, name in ipairs(groups) do wanted[name] = true end
  for _, one in ipairs(#groups > 0 and living() or {}) do count = count + members_of_any(one, groups) end
  for _, id in ipairs(clients) do
    local owner = owner_of(id)
    if owner and is_alive(owner) then
      local counted, packed = false, #groups > 0 and call('HGET', GROUPS, id)
      for _, name in ipairs(packed and cmsgpack.unpack(packed) or {}) do counted = counted or wanted[name] end
      if not counted then count = count + 1 end
    end
  end
  return count
end

-- --- bookmarks

local function joined(position, spans, known)  -- As Bookmark.joined() in bookmarks.py.
  local first, kept, last, earlier = {}, {}, unpack(cmsgpack.unpack(known))
  for k, span in ipairs(spans) do
    local other = first[span[1]]
    if not other or span[2] < spans[other][2] then first[span[1]] = k end
  end
  for _, span in ipairs(earlier) do
    local ends = span[3] == '' and last or span[3]
    local met = spans[first[span[1]]]
    if met and met[2] <= ends then
      if span[2] < met[2] then met[2] = span[2] end
    else
      kept[#kept + 1] = {span[1], span[2], ends}
    end
  end
  for _, span in ipairs(spans) do kept[#kept + 1] = span end
  return {position, {unpack(kept, math.max(1, #kept - MOST_SPANS + 1))}}
end

local function forget_bookmarks()  -- Some of those whose time is over, or that are too many.
  local gone = call('ZRANGEBYSCORE', BOOKMARKED, '-inf', now, 'LIMIT', 0, FORGOTTEN_AT_ONCE)
  local excess = math.min(call('ZCARD', BOOKMARKED) - #gone - MOST_BOOKMARKS, FORGOTTEN_AT_ONCE - #gone)
  if excess > 0 then
    local early = call('ZRANGE', BOOKMARKED, #gone, #gone + excess - 1, 'WITHSCORES')
    for k = 1, #early, 2 do gone[#gone + 1] = early[k] end
    call('HSET', META, 'bookmarks_lost_until', early[#early])
  end
  if #gone > 0 then
    call('HDEL', BOOKMARKS, unpack(gone))
    call('ZREM', BOOKMARKED, unpack(gone))
    call('ZREM', OWNERS, unpack(gone))
  end
end

-- --- nodes that are gone

local function folded(of) return P..'folded:'..(call('HGET', META, 'started') or '')..':'..of end

local function remove_node(gone)
  call('SADD', DEAD, gone)
  local counted = call('HMGET', NODE..gone, 'messages', 'slow')
  call('HINCRBY', META, 'messages', counted[1] or 0)
  call('HINCRBY', META, 'slow', counted[2] or 0)
  -- It may only have been stopped: then it counts on from here, and join() takes this out of the sums again.
  call('SET', folded(gone), (counted[1] or 0)..' '..(counted[2] or 0), 'EX', 86400)
  call('UNLINK', NODE..gone, POSTS..gone)
  call('ZREM', NODES, gone)
  call('ZREM', TAILS, gone)
end

local function remove_dead_nodes()
  for _, dead in ipairs(call('ZRANGEBYSCORE', NODES, '-inf', now)) do remove_node(dead) end
end

local function remove_clients_of_the_dead()  -- Some of them: the next renewal removes more.
  local left = REMOVED_AT_ONCE
  for _, dead in ipairs(call('SMEMBERS', DEAD)) do
    local ids = call('SRANDMEMBER', MEMBERS..dead, left)
    for _, id in ipairs(ids) do remove(id, dead) end
    left = left - #ids
    if left == 0 then return end
    call('SREM', DEAD, dead)
  end
end

-- --- join, and the refill of a log that lost records

-- An epoch is <term>-<run id of this Redis>-<time>. The term counts on, so that the later of two epochs is the greater.
local function run_id()  -- Without the right to INFO, only the loss of records is noticed.
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and info:match('run_id:(%x+)') or ''
end

local function offered_since()  -- The id after which no record is missing among those offered, up to the newest.
  local parts = {}
  for _, part in ipairs(call('HVALS', PARTS)) do
    local last, first = part:match('(.*) (.*)')
    parts[#parts + 1] = {last, first}
  end
  table.sort(parts, function(one, other) return one[1] > other[1] end)
  local since = parts[1] and parts[1][2] or ''
  for _, part in ipairs(parts) do
    if part[1] >= since and part[2] < since then since = part[2] end
  end
  return since
end

local function begin_refill()
  local since = offered_since()
  if since > newest then
    -- The rest of the log ends before the offered records begin.
    if call('EXISTS', LOG) == 1 then call('RENAME', LOG, OLD) end
    newest, before, kept, bytes = since, since, 0, 0
  end
  if newest == '' then
    newest = next_id('')
    before = newest
    call('HSET', META, 'origin', before)
  end
  -- Above all numbers that any process may have read before, so that it notices the gap.
  least = math.max(seq + 1000000, now)
  call('HSET', META, 'least', least)
end

local function restore()  -- Put some of the offered records back; return whether these were the last.
  if call('HGET', META, 'restoring') ~= '0' then begin_refill() end
  local room, count = RESTORED_BYTES, 0
  for _, id in ipairs(call('ZRANGE', OFFERED, 0, RESTORED_AT_ONCE - 1)) do
    local record = call('HGET', OFFERS, id)
    if id > newest then
      if room < 0 then break end
      add(id, unpack(cmsgpack.unpack(record)))
      room = room - #record
    end
    call('HDEL', OFFERS, id)
    count = count + 1
  end
  if count > 0 then call('ZREMRANGEBYRANK', OFFERED, 0, count - 1) end
  save()
  if call('EXISTS', OFFERED) == 0 then
    call('HDEL', META, 'restoring', 'offers_of', 'restored', 'unused')
    call('UNLINK', AWAITED, PARTS)
    return true
  end
  call('HSET', META, 'restoring', 0)
  return false
end

-- `bookmarked` numbers what has been written down, so that a loss is noticed.
local SUMS = {'total', 'sent', 'messages', 'slow', 'counter', 'bookmarked'}

local function begin_epoch(run, last_epoch, branch, awaited)
  -- The records in the log are of the epoch before, also where its own refill did not end.
  if not call('HGET', META, 'restored') then call('HSET', META, 'restored', last_epoch or '') end
  local term = math.max(tonumber((last_epoch or ''):match('^%d+') or 0), tonumber(branch:match('^%d+') or 0)) + 1
  local current = string.format('%08d-%s-%s', term, run, text(now))
  call('UNLINK', AWAITED)
  for _, one in ipairs(awaited) do call('ZADD', AWAITED, now + AWAIT, one) end
  call('HSET', META, 'epoch', current, 'run', run, 'restoring', #awaited > 0 and now or now + RESTORE)
  return current
end

local function wait_on()  -- The node offers records or registers clients, and is not done yet.
  call('ZADD', AWAITED, 'GT', math.min(now + RESTORE, tonumber(epoch:match('%d+$')) + MOST_RESTORE), node)
end

local function count_on(messages, slow)  -- Enter the node's counters: the larger of its own and those known here.
  local known = call('HMGET', NODE..node, 'messages', 'slow')
  local added = call('GET', folded(node))
  if added then
    local added_messages, added_slow = added:match('(%d+) (%d+)')
    call('HINCRBY', META, 'messages', 0 - added_messages)
    call('HINCRBY', META, 'slow', 0 - added_slow)
    call('DEL', folded(node))
    messages, slow = math.max(messages, added_messages), math.max(slow, added_slow)
  end
  call('HSET', NODE..node, 'messages', math.max(messages, known[1] or 0), 'slow', math.max(slow, known[2] or 0))
end

local function join()
  -- The newest record of the node, the epoch of its last join, which names its branch, and whether it has made its offers
  -- and registered its clients in this epoch.
  local last, branch, has_entered, known = arg(), arg(), arg() == '1', {}
  -- The number of records that a node reads when it joins, and their bytes with so many for each, at most.
  local most, cache, each = number_arg(), number_arg(), number_arg()
  for k in ipairs(SUMS) do known[k] = number_arg() end
  local started, messages, slow = number_arg(), number_arg(), number_arg()
  local run, state = run_id(), call('HMGET', META, 'epoch', 'run', 'restoring')
  local current, restoring = state[1], tonumber(state[3] or nil)
  local fresh, nodes = epoch == '', living()
  if not current then
    call('HSET', META, 'newest', '', 'before', '', 'kept', 0, 'bytes', 0, 'seq', now, 'started', now)
  end
  remove_dead_nodes()
  load()
  local is_ahead = not restoring and current and (branch > current or branch == current and last > newest)
  -- A fresh node has begun an empty log before the others missed theirs. No record is in it, so that of the others counts.
  local is_unused = not restoring and not fresh and current and branch ~= current and last ~= ''
    and newest == call('HGET', META, 'origin')
  if is_unused then
    newest = ''
    call('HSET', META, 'restored', '', 'newest', '', 'unused', current)
    nodes = {}
  end
  if not current or run ~= state[2] or is_ahead or is_unused then
    current = begin_epoch(run, current, branch, nodes)
    restoring = tonumber(call('HGET', META, 'restoring'))
    if fresh and #nodes == 0 then restoring = now end
  end
  if not fresh then
    if epoch ~= current then
      -- Only in a new epoch: within one, the sums are not behind, and `known` may be from before a node came back.
      for k, name in ipairs(SUMS) do
        local sum = tonumber(call('HGET', META, name) or 0)
        if name == 'bookmarked' and sum < known[k] then call('HSET', META, 'bookmarks_lost_until', now + BOOKMARK_TTL) end
        call('HSET', META, name, math.max(known[k], sum))
      end
    end
    if started > 0 and started < tonumber(call('HGET', META, 'started')) then call('HSET', META, 'started', started) end
  elseif call('ZCARD', NODES) == 0 then
    call('HDEL', META, 'leader', unpack(SUMS))
    call('HSET', META, 'started', now)
  end
  count_on(messages, slow)
  call('DEL', POSTS..node)
  call('ZADD', NODES, now + LEASE, node)
  call('SREM', DEAD, node)
  has_entered = has_entered and epoch == current
  local members = has_entered and {} or call('SMEMBERS', MEMBERS..node)
  if has_entered then call('ZREM', AWAITED, node) end
  -- The second bounds: a clock that is put back makes it no longer.
  local waits = restoring and restoring > now and restoring <= now + AWAIT
  waits = waits or restoring and restoring > 0 and call('ZCOUNT', AWAITED, now, now + AWAIT) > 0
  if waits or restoring and not restore() then return {current, members, newest} end
  trim()
  local first = call('XRANGE', LOG, '-', '+', 'COUNT', 1)[1]
  -- A node whose newest record is not here has delivered others than this log has, or missed some.
  local place = place_of(last)
  local front, size = before, call('XLEN', LOG)
  tail = place or first and number(first) - 1 or seq
  if first and (fresh or not place) then
    -- Of a long log the newest end, as far as it fits, by the mean of its sizes.
    local fits = math.min(most, math.floor(cache / (bytes / size + each)))
    if size > fits then tail = math.max(tail, seq - fits) end
    front = id_up_to(tail)
  end
  call('ZADD', TAILS, tail, node)
  local since = tonumber(call('HGET', META, 'started'))
  return {current, members, front, tail, place and 1 or 0, seq, now, since}
end

local function offer()  -- Take records of the node, or return whether they are wanted: others may have offered them.
  -- The newest record of the node and the id that it goes back to with these, in one unbroken part of the log. Of these
  -- the newest, and their number.
  local branch, last, first, newest_here, count = arg(), arg(), arg(), arg(), number_arg()
  local state = call('HMGET', META, 'epoch', 'restoring', 'offers_of', 'restored', 'unused')
  if state[1] ~= epoch then return 'join' end
  call('ZADD', NODES, now + LEASE, node)
  -- Of two branches the later one counts; the nodes of the other, and late ones, learn with their join that their
  -- records are none.
  local of = state[3] or state[4]
  if not state[2] or state[2] == '0' or branch < of or branch == state[5] then return 'refused' end
  if branch > of then call('UNLINK', OFFERS, OFFERED, PARTS) end
  call('HSET', META, 'offers_of', branch)
  wait_on()
  if cursor == #ARGV and call('ZLEXCOUNT', OFFERED, '['..first, '['..newest_here) < count then return 'wanted' end
  call('HSET', PARTS, node, last..' '..first)
  while cursor < #ARGV do
    local id, age = arg(), arg()
    local rest, size, audience, replayed, key, answer, addressed = arg(), arg(), arg(), arg(), arg(), arg(), arg()
    call('ZADD', OFFERED, 0, id)
    call('HSET', OFFERS, id, cmsgpack.pack({now - age, rest, size, audience, replayed, key, answer, addressed}))
  end
  return 'offered'
end

-- --- the operations

local ops = {}

local function repeated(key, fingerprint)  -- The reply to an earlier request with the key, or 'reused', or nil.
  local last = call('GET', ONCE..key)
  local entry = last and call('XRANGE', LOG, last..'-0', last..'-0')[1]
  if not entry or entry[2][KEY] ~= key then return nil end
  local known_fingerprint, reply = unpack(cmsgpack.unpack(entry[2][ANSWER]))
  return known_fingerprint == fingerprint and reply or 'reused'
end

local function is_next_of_leader(counter)
  local held = call('HMGET', META, 'leader', 'counter')
  return held[1] == node and tonumber(held[2] or 0) == counter - 1
end

function ops.append()
  local count, counter, key, fingerprint = number_arg(), arg(), arg(), arg()
  local drafts = cursor + 1
  cursor = cursor + 4 * count
  local known = key ~= '' and repeated(key, fingerprint)
  if known then return known end
  if counter ~= '' then
    if not is_next_of_leader(tonumber(counter)) then return {now, 0} end
    call('HSET', META, 'counter', counter)
  end
  -- When, whether it is a repetition, and the receipts.
  local reply = {now, 0}
  -- By audience: no client comes or goes meanwhile.
  local addressed_of = {}
  for k = 1, count do
    local first = drafts + 4 * (k - 1)
    local rest, size, audience, replayed = unpack(ARGV, first, first + 3)
    local id, stored_key, answer = next_id(newest), '', key ~= '' and '+' or ''
    local addressed = addressed_of[audience] or recipients(audience)
    addressed_of[audience] = addressed
    reply[#reply + 1] = id
    reply[#reply + 1] = addressed
    if key ~= '' and k == count then
      reply[2] = 1
      stored_key, answer = key, cmsgpack.pack({fingerprint, reply})
      reply[2] = 0
    end
    add(id, now, rest, size, audience, replayed, stored_key, answer, addressed)
  end
  sent = sent + count
  return reply
end

function ops.reach()  -- Where a reader begins, whether that is complete, and how much each name has for it.
  local since, last, names = arg(), arg(), number_arg()
  trim()
  local after, complete
  if since == '' then
    complete = before == call('HGET', META, 'origin')
  else
    after = place_of(since)
    complete = after ~= nil
  end
  local position = after and since or before
  after = after or floor()
  local until_number = math.max(after, (last_up_to(last)))
  local reply = {position, complete and 1 or 0, text(after), text(until_number)}
  local function count(name) return up_to(FOR..name, until_number) - up_to(FOR..name, after) end
  reply[5] = count('*')
  for _ = 1, names do reply[#reply + 1] = count(arg()) end
  return reply
end

function ops.count()  -- How many records are for any of the names, between two numbers; and the number reached so far.
  local after, last, names, seen, count = number_arg(), number_arg(), number_arg(), {}, 0
  local lists, reached = {}, last
  for k = 1, names do
    local key = FOR..arg()
    local first = up_to(key, after)
    lists[k] = call('LRANGE', key, first, first + 999)
    if #lists[k] == 1000 then reached = math.min(reached, tonumber(lists[k][1000])) end
  end
  for _, list in ipairs(lists) do
    for _, one in ipairs(list) do
      if not seen[one] and tonumber(one) <= reached then seen[one], count = true, count + 1 end
    end
  end
  return {count, text(reached)}
end

function ops.read()  -- Records for everyone and for the names, after one id and up to another.
  local after, last, backwards, most, most_bytes, names = arg(), arg(), arg() == '1', number_arg(), number_arg(), number_arg()
  local first, final, found, seen = (last_up_to(after)), (last_up_to(last)), {}, {}
  local sources = {'*', '-'}
  for _ = 1, names do sources[#sources + 1] = arg() end
  local is_part = false
  for _, name in ipairs(sources) do
    local key = FOR..name
    local from = backwards and math.max(up_to(key, final) - most, 0) or up_to(key, first)
    local list = call('LRANGE', key, from, from + most - 1)
    is_part = is_part or #list == most
    for _, one in ipairs(list) do
      local value = tonumber(one)
      if value > first and value <= final and not seen[one] then seen[one], found[#found + 1] = true, value end
    end
  end
  table.sort(found, function(a, b) if backwards then return a > b end return a < b end)
  local reply, size = {before, '', ''}, 0
  for k, value in ipairs(found) do
    local entry = call('XRANGE', LOG, text(value)..'-0', text(value)..'-0')[1]
    size = size + (entry and #entry[2][REST] or 0)
    if #reply == most + 3 or size > most_bytes and #reply > 3 then
      is_part = true
      break
    end
    if entry then reply[#reply + 1] = entry end
    if k == #found then is_part = is_part and #found >= most end
  end
  if is_part and #reply > 3 then
    reply[2], reply[3] = reply[#reply][2][ID], id_up_to(number(reply[#reply]) - 1)
  end
  return reply
end

local function step(id, change)
  local part = id:sub(1, 8)
  if call('HINCRBY', STEP..part, id, change) == 0 then call('HDEL', STEP..part, id) end
  if call('HINCRBY', STEPS, part, change) == 0 then call('HDEL', STEPS, part) end
  call('ZADD', STEPPED, 0, part)
end

local function trim_steps()  -- Of some parts that the log has passed only the sum is left, as a part before all others.
  local parts = call('ZRANGE', STEPPED, 0, 9)
  for _, part in ipairs(parts) do
    if part >= before:sub(1, 8) then break end
    call('HINCRBY', STEPS, '', call('HGET', STEPS, part) or 0)
    call('HDEL', STEPS, part)
    call('UNLINK', STEP..part)
    call('ZREM', STEPPED, part)
  end
end

function ops.tally()  -- Add to the counts of deliveries.
  for _ = 1, number_arg() do step(arg(), number_arg()) end
  for _ = 1, number_arg() do
    local id, written, addressed = arg(), number_arg(), number_arg()
    if written ~= 0 then call('HINCRBY', COUNTED, id, written) end
    if addressed ~= 0 then call('HINCRBY', COUNTED, 'a:'..id, addressed) end
  end
  return 0
end

function ops.find()  -- An entry with its counts, if it is in the log.
  local id = arg()
  trim()
  local number = place_of(id)
  if not number or number <= floor() then return {} end
  local entry = call('XRANGE', LOG, text(number)..'-0', text(number)..'-0')[1]
  local counted = call('HMGET', COUNTED, id, 'a:'..id)
  local written, part = tonumber(counted[1] or 0), id:sub(1, 8)
  if entry[2][AUDIENCE] == '' then
    local sums = call('HGETALL', STEPS)
    for k = 1, #sums, 2 do if sums[k] < part then written = written + sums[k + 1] end end
    local steps = call('HGETALL', STEP..part)
    for k = 1, #steps, 2 do if steps[k] < id then written = written + steps[k + 1] end end
  end
  return {entry, written, tonumber(counted[2] or 0)}
end

function ops.admit()
  local id, groups = arg(), arg()
  local owner, refusal = owner_of(id), nil
  for k = 1, number_arg() do
    local group, most = arg(), number_arg()
    local held = members(group) - call('SISMEMBER', GROUP..node..':'..group, id)
    if held >= most then refusal = refusal or {'limit', k, held} end
  end
  if is_taken(owner) then return {'taken', owner} end
  if refusal then return refusal end
  if owner ~= node then
    local count = active()
    if count >= MAX then return {'full', count} end
  end
  enter(id, owner, groups)
  call('HINCRBY', META, 'total', 1)
  return newest
end

function ops.subscribe()
  local id, groups = arg(), arg()
  if owner_of(id) == node then set_groups(id, node, groups) end
  return newest
end

function ops.online()
  local counts = {}
  for k = 1, number_arg() do counts[k] = members('user:'..arg()) end
  return counts
end

function ops.revoke()
  local user, second = arg(), number_arg() or math.floor(now / 1000000)
  if second > tonumber(call('HGET', REVOKED, user) or -1) then
    call('HSET', REVOKED, user, second)
    call('ZADD', REVOCATIONS, call('HINCRBY', META, 'revoked', 1), user)
  end
  return second
end

function ops.revocations()
  local number, ttl = number_arg(), number_arg()
  for _, user in ipairs(call('ZRANGE', REVOCATIONS, 0, 99)) do
    if call('HGET', REVOKED, user) * 1000000 + ttl >= now then break end
    call('HDEL', REVOKED, user)
    call('ZREM', REVOCATIONS, user)
  end
  local found = call('ZRANGEBYSCORE', REVOCATIONS, '('..text(number), '+inf', 'WITHSCORES', 'LIMIT', 0, 1000)
  for k = 1, #found, 2 do number, found[k + 1] = tonumber(found[k + 1]), tonumber(call('HGET', REVOKED, found[k])) end
  return {number, unpack(found)}
end

function ops.register()
  local taken = {}
  for _ = 1, number_arg() do
    local id, groups = arg(), arg()
    local owner = owner_of(id)
    if is_taken(owner) then
      taken[#taken + 1] = id
    else
      enter(id, owner, groups)
    end
  end
  return taken
end

function ops.leave()
  remove(arg(), node)
  return 0
end

function ops.keep()
  local owner, position, packed = arg(), arg(), arg()
  local known = call('HGET', BOOKMARKS, owner)
  local last = known and cmsgpack.unpack(known)[1]
  if not known then
    call('HSET', BOOKMARKS, owner, cmsgpack.pack({position, cmsgpack.unpack(packed)}))
    call('ZADD', OWNERS, 0, owner)
  elseif position > last then
    call('HSET', BOOKMARKS, owner, cmsgpack.pack(joined(position, cmsgpack.unpack(packed), known)))
  end
  call('ZADD', BOOKMARKED, now + BOOKMARK_TTL, owner)
  kept_bookmarks = kept_bookmarks + 1
  return 0
end

function ops.bookmark()
  local known = call('HGET', BOOKMARKS, arg())
  return {known, now < tonumber(call('HGET', META, 'bookmarks_lost_until') or 0) and 1 or 0}
end

function ops.bookmarks()  -- Those behind an owner, with the owner behind which the next begin; empty at the end.
  local after, most, least = arg(), number_arg(), arg()
  local owners = call('ZRANGEBYLEX', OWNERS, after, '+', 'LIMIT', 0, most)
  local reply = {#owners == most and owners[most] or ''}
  for k, packed in ipairs(#owners > 0 and call('HMGET', BOOKMARKS, unpack(owners)) or {}) do
    if cmsgpack.unpack(packed)[1] >= least then reply[#reply + 1], reply[#reply + 2] = owners[k], packed end
  end
  return reply
end

function ops.draw()  -- As draw() in store.py.
  local name, cost, depth = BUCKET..arg(), number_arg(), number_arg()
  local left = math.min(math.max((call('GET', name) or 0) - now, 0), depth)
  if left + cost > depth then return {0, left} end
  left = left + cost
  call('SET', name, text(now + left), 'PX', math.ceil(left / 1000))
  return {1, left}
end

function ops.lead()
  local held = call('HMGET', META, 'leader', 'leads_until')
  local leader, ends = held[1], tonumber(held[2] or 0)
  if leader and leader ~= node and is_alive(leader) and ends > now and ends <= now + LEASE then return -1 end
  call('HSET', META, 'leader', node, 'leads_until', now + LEASE)
  return tonumber(call('HGET', META, 'counter') or 0)
end

function ops.report()
  call('HSET', NODE..node, 'messages', arg(), 'slow', arg())
  return 0
end

function ops.census()
  local sums = call('HMGET', META, 'total', 'sent', 'messages', 'slow')
  local total, messages, slow = tonumber(sums[1] or 0), tonumber(sums[3] or 0), tonumber(sums[4] or 0)
  local others = {}
  for _, one in ipairs(living()) do
    local counted = call('HMGET', NODE..one, 'messages', 'slow')
    messages, slow = messages + (counted[1] or 0), slow + (counted[2] or 0)
    if one ~= node then others[#others + 1] = one end
  end
  return {active(), total, tonumber(sums[2] or 0) + sent, messages, slow, unpack(others)}
end

function ops.post()
  local to, message = arg(), arg()
  if is_alive(to) then call('XADD', POSTS..to, 'MAXLEN', 1000, '*', 'n', node, 'm', message) end
  return 0
end

function ops.renew()
  call('XTRIM', POSTS..node, 'MINID', '=', arg())
  -- After Redis's clock was put back, no lease may end later than a lease that is renewed now.
  for _, one in ipairs(call('ZRANGEBYSCORE', NODES, now + LEASE + 1, '+inf')) do
    call('ZADD', NODES, now + LEASE, one)
  end
  remove_clients_of_the_dead()
  trim()
  trim_old()
  forget_bookmarks()
  trim_steps()
  local known = call('HMGET', META, 'total', 'sent', 'messages', 'slow', 'counter', 'bookmarked', 'started')
  for k = 1, 7 do known[k] = tonumber(known[k] or 0) end
  known[8] = before
  return known
end

function ops.close()
  remove_node(node)
  return 0
end

local alone = ({join = join, offer = offer})[ARGV[cursor + 1]]
if alone then
  cursor = cursor + 1
  return alone()
end
remove_dead_nodes()
local life = call('HMGET', META, 'epoch', 'run', 'restoring')
if life[1] ~= epoch or life[2] ~= run_id() or not is_alive(node) then return 'join' end
if life[3] and life[3] ~= '0' then wait_on() end
call('ZADD', NODES, now + LEASE, node)
call('ZADD', TAILS, tail, node)
load()
local replies = {0}
while cursor < #ARGV do replies[#replies + 1] = ops[arg()]() end
if kept_bookmarks > 0 then
  call('HINCRBY', META, 'bookmarked', kept_bookmarks)
  if call('ZCARD', BOOKMARKED) > MOST_BOOKMARKS then forget_bookmarks() end
end
if sent > 0 then
  save()
  call('HINCRBY', META, 'sent', sent)
  if kept > SIZE or bytes > BYTES then trim() end
end
replies[1] = seq
return replies
