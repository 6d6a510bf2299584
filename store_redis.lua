-- What store_redis.py has done in Redis: one call is one group of operations of one node, and one atomic step.
--
-- KEYS[1] is the hash `meta`. ARGV begins with 12 words about the node and its settings, in the order below; then come
-- the operations, each its name and its arguments. The answer is 'join' where nothing was done, since the node is not
-- alive or of another epoch; else the number of the newest entry, and an answer for each operation. 'join' and 'offer'
-- stand alone. Times are microseconds of Redis's clock.
--
-- The keys, behind the prefix:
--   meta           hash    what there is once, and the sums of what dead nodes have counted
--   log            stream  the entries <seq>-0: Id, Time, Rest, Audience, rePlayed, Once, siZe, ansWer
--   once:KEY       string  the number of the last entry of an append that may be repeated. That one has the key, and
--                          for ansWer the fingerprint and what was answered; the entries before it have '+'
--   nodes, tails   zsets   the nodes that are alive: when the lease ends, and the last number read
--   node:NODE      hash    what it has counted;  folded:STARTED:NODE  the same, as added to the sums
--   members:NODE   set     its clients
--   posts:NODE     stream  messages to it
--   clients        hash    the node of each client;  topics  its topics, packed;  addresses  its address, if limited
--   topic:NODE:NAME  set   its clients with this topic
--   address:NODE:NAME  set  its clients of this address
--   dead           set     the nodes whose clients are to be removed; they count for nothing and may be taken
--   bucket:NAME    string  when it is full; expires then
--   offers         hash    records to fill the log with;  offered  zset  their ids, in order

local P, epoch, node, tail = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
math.randomseed(tonumber(ARGV[5]))
local MAX, MAX_PER_ADDRESS = tonumber(ARGV[6]), tonumber(ARGV[7])
local SIZE, BYTES, TTL = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local LEASE, RESTORE = tonumber(ARGV[11]), tonumber(ARGV[12])
local i = 12
local function arg() i = i + 1; return ARGV[i] end

local call = redis.call
local META, LOG, NODES, TAILS, CLIENTS, TOPICS = P..'meta', P..'log', P..'nodes', P..'tails', P..'clients', P..'topics'
local OFFERS, OFFERED, ROW, MEMBERS = P..'offers', P..'offered', P..'node:', P..'members:'
local POSTS, TOPIC, BUCKET, DEAD = P..'posts:', P..'topic:', P..'bucket:', P..'dead'
local ADDRESSES, ADDRESS = P..'addresses', P..'address:'
-- How many clients of the dead one renewal removes, and how many records one join puts back: milliseconds each.
local REMOVED_AT_ONCE, RESTORED_AT_ONCE = 1000, 1000
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local newest, before, kept, bytes, seq, sent = '', '', 0, 0, 0, 0

local function load()
  local state = call('HMGET', META, 'newest', 'before', 'kept', 'bytes', 'seq')
  newest, before, kept, bytes, seq = state[1], state[2], tonumber(state[3]), tonumber(state[4]), tonumber(state[5])
end

local function save()
  call('HSET', META, 'newest', newest, 'before', before, 'kept', kept, 'bytes', bytes, 'seq', seq)
end

local function next_id(last)
  -- 48 bits of time, 12 + 14 + 48 random ones, of which the first stays 0; they count on if time does not.
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

local function add(id, at, rest, size, audience, replayed, once, answer)
  newest, seq, bytes = id, seq + 1, bytes + size
  if replayed == '1' then kept = kept + 1 end
  call('XADD', LOG, string.format('%.0f-0', seq), 'i', id, 't', at, 'r', rest, 'a', audience, 'p', replayed,
    'o', once, 'z', size, 'w', answer)
  local left = math.ceil((at + TTL - now) / 1000)
  if once ~= '' and left > 0 then call('SET', P..'once:'..once, string.format('%.0f', seq), 'PX', left) end
end

local function number(entry) return tonumber(entry[1]:sub(1, -3)) end

local function trim()
  local slowest = call('ZRANGE', TAILS, 0, 0, 'WITHSCORES')[2]
  slowest = slowest and tonumber(slowest) or seq
  local from, full = '-', true
  while full do
    local entries = call('XRANGE', LOG, from, '+', 'COUNT', 20)
    full = #entries == 20
    for _, entry in ipairs(entries) do
      local f = entry[2]
      local fits = kept <= SIZE and bytes <= BYTES and tonumber(f[4]) + TTL >= now
      if fits or number(entry) > slowest then full = false; break end
      before, bytes, from = f[2], bytes - f[14], string.format('%.0f-0', number(entry) + 1)
      if f[10] == '1' then kept = kept - 1 end
      local key = P..'once:'..f[12]
      if f[12] ~= '' and tonumber(call('GET', key) or 0) == number(entry) then call('DEL', key) end
    end
  end
  if from ~= '-' then call('XTRIM', LOG, 'MINID', '=', from); save() end
end

local function set_topics(id, owner, packed)
  local topic, old = TOPIC..owner..':', call('HGET', TOPICS, id)
  if old then for _, name in ipairs(cmsgpack.unpack(old)) do call('SREM', topic..name, id) end end
  if packed ~= '' then
    call('HSET', TOPICS, id, packed)
    for _, name in ipairs(cmsgpack.unpack(packed)) do call('SADD', topic..name, id) end
  elseif old then call('HDEL', TOPICS, id) end
end

local function set_address(id, owner, address)
  if MAX_PER_ADDRESS == 0 then address = '' end
  local old = call('HGET', ADDRESSES, id)
  if old then call('SREM', ADDRESS..owner..':'..old, id) end
  if address ~= '' then
    call('HSET', ADDRESSES, id, address)
    call('SADD', ADDRESS..owner..':'..address, id)
  elseif old then call('HDEL', ADDRESSES, id) end
end

local function remove(id, owner)
  call('SREM', MEMBERS..owner, id)
  if call('HGET', CLIENTS, id) == owner then
    call('HDEL', CLIENTS, id)
    set_topics(id, owner, '')
    set_address(id, owner, '')
  end
end

local function is_alive(one) return call('ZSCORE', NODES, one) end

local function enter(id, owner, packed, address)
  if owner and owner ~= node then remove(id, owner) end
  call('HSET', CLIENTS, id, node)
  call('SADD', MEMBERS..node, id)
  set_topics(id, node, packed)
  set_address(id, node, address)
end

local function clients_of(address)
  local count = 0
  for _, one in ipairs(call('ZRANGE', NODES, 0, -1)) do count = count + call('SCARD', ADDRESS..one..':'..address) end
  return count
end

local function active()
  local count = call('HLEN', CLIENTS)
  for _, dead in ipairs(call('SMEMBERS', DEAD)) do count = count - call('SCARD', MEMBERS..dead) end
  return count
end

local function folded(of) return P..'folded:'..(call('HGET', META, 'started') or '')..':'..of end

local function put_out(dead)
  call('SADD', DEAD, dead)
  local row = call('HMGET', ROW..dead, 'messages', 'slow')
  call('HINCRBY', META, 'messages', row[1] or 0)
  call('HINCRBY', META, 'slow', row[2] or 0)
  -- It may only have been stopped: then it counts on from here, and this is taken out of the sums again.
  call('SET', folded(dead), (row[1] or 0)..' '..(row[2] or 0), 'EX', 86400)
  call('UNLINK', ROW..dead, POSTS..dead)
  call('ZREM', NODES, dead)
  call('ZREM', TAILS, dead)
end

local function put_out_the_dead()
  for _, dead in ipairs(call('ZRANGEBYSCORE', NODES, '-inf', now)) do put_out(dead) end
end

local function remove_some_of_the_dead()
  local left = REMOVED_AT_ONCE
  for _, dead in ipairs(call('SMEMBERS', DEAD)) do
    local ids = call('SRANDMEMBER', MEMBERS..dead, left)
    for _, id in ipairs(ids) do remove(id, dead) end
    left = left - #ids
    if left == 0 then return end
    call('SREM', DEAD, dead)
  end
end

local function recipients(audience)
  if audience == '' then return active() end
  local clients, topics = unpack(cmsgpack.unpack(audience))
  local count, wanted = 0, {}
  for _, name in ipairs(topics) do wanted[name] = true end
  for _, one in ipairs(#topics > 0 and call('ZRANGE', NODES, 0, -1) or {}) do
    local largest, size, seen = nil, 0, {}
    for _, name in ipairs(topics) do
      local key = TOPIC..one..':'..name
      local members = call('SCARD', key)
      if members > size then largest, size = key, members end
    end
    for _, name in ipairs(largest and topics or {}) do
      local key = TOPIC..one..':'..name
      for _, id in ipairs(key ~= largest and call('SDIFF', key, largest) or {}) do
        if not seen[id] then seen[id], size = true, size + 1 end
      end
    end
    count = count + size
  end
  for _, id in ipairs(clients) do
    local owner = call('HGET', CLIENTS, id)
    if owner and is_alive(owner) then
      local counted, packed = false, #topics > 0 and call('HGET', TOPICS, id)
      for _, name in ipairs(packed and cmsgpack.unpack(packed) or {}) do counted = counted or wanted[name] end
      if not counted then count = count + 1 end
    end
  end
  return count
end

local function restore()  -- Some of it; return whether that is all.
  local offered = call('HGET', META, 'offered') or ''
  if offered > newest then  -- What is left of the log ends before all that is offered begins.
    call('UNLINK', LOG)
    newest, before, kept, bytes = offered, offered, 0, 0
  end
  if newest == '' then newest = next_id(''); before = newest end
  local last = call('ZREVRANGE', OFFERED, 0, 0)[1]
  if last and last > newest and call('HGET', META, 'restoring') ~= '0' then seq = math.max(seq, now) end
  for k, id in ipairs(call('ZPOPMIN', OFFERED, RESTORED_AT_ONCE)) do
    if k % 2 == 1 and id > newest then add(id, unpack(cmsgpack.unpack(call('HGET', OFFERS, id)))) end
    if k % 2 == 1 then call('HDEL', OFFERS, id) end
  end
  save()
  if call('EXISTS', OFFERED) == 0 then call('HDEL', META, 'restoring', 'offered'); return true end
  call('HSET', META, 'restoring', 0)
end

local function join()
  local last, known, names = arg(), {}, {'total', 'sent', 'messages', 'slow', 'counter'}
  for k in ipairs(names) do known[k] = tonumber(arg()) end
  local started, messages, slow = tonumber(arg()), tonumber(arg()), tonumber(arg())
  local info = redis.pcall('INFO', 'server')  -- Without the right to INFO only the loss of records is noticed.
  local run = type(info) == 'string' and info:match('run_id:(%x+)') or ''
  local state = call('HMGET', META, 'epoch', 'run', 'restoring')
  local current, restoring = state[1], tonumber(state[3] or nil)
  local fresh, others = epoch == '', call('ZCARD', NODES) > 0
  if not current then
    call('HSET', META, 'newest', '', 'before', '', 'kept', 0, 'bytes', 0, 'seq', now, 'started', now)
  end
  put_out_the_dead()
  load()
  if not current or run ~= state[2] or not restoring and last > newest then
    current = run..string.format('-%.0f', now)
    call('HSET', META, 'epoch', current, 'run', run)
    restoring = (not fresh or others) and now + RESTORE or now
    call('HSET', META, 'restoring', restoring)
  end
  if not fresh then
    -- Within one life of the data the sums are not behind; what is known of them may be from before a node came back.
    for k, name in ipairs(epoch ~= current and names or {}) do
      call('HSET', META, name, math.max(known[k], tonumber(call('HGET', META, name) or 0)))
    end
    if started > 0 and started < tonumber(call('HGET', META, 'started')) then call('HSET', META, 'started', started) end
  elseif call('ZCARD', NODES) == 0 then
    call('HDEL', META, 'leader', unpack(names))
    call('HSET', META, 'started', now)
  end
  local row, fold = call('HMGET', ROW..node, 'messages', 'slow'), call('GET', folded(node))
  if fold then
    local m, s = fold:match('(%d+) (%d+)')
    call('HINCRBY', META, 'messages', 0 - m)
    call('HINCRBY', META, 'slow', 0 - s)
    call('DEL', folded(node))
    messages, slow = math.max(messages, m), math.max(slow, s)
  end
  call('HSET', ROW..node, 'messages', math.max(messages, row[1] or 0), 'slow', math.max(slow, row[2] or 0))
  call('DEL', POSTS..node)
  call('ZADD', NODES, now + LEASE, node)
  call('SREM', DEAD, node)
  local members = call('SMEMBERS', MEMBERS..node)
  -- No clock that jumps back makes it longer.
  if restoring and restoring > now and restoring <= now + RESTORE then return {current, members, newest} end
  if restoring and not restore() then return {current, members, newest} end
  trim()
  local first = call('XRANGE', LOG, '-', '+', 'COUNT', 1)[1]
  tail = math.min(math.max(tail, first and number(first) - 1 or seq), seq)
  call('ZADD', TAILS, tail, node)
  return {current, members, before, tail, seq, now, tonumber(call('HGET', META, 'started'))}
end

local function offer()
  if call('HGET', META, 'epoch') ~= epoch or call('HEXISTS', META, 'restoring') == 0 then return 'join' end
  local front = arg()
  if front > (call('HGET', META, 'offered') or '') then call('HSET', META, 'offered', front) end
  while i < #ARGV do
    local id, age, rest, size, audience, replayed = arg(), arg(), arg(), arg(), arg(), arg()
    call('ZADD', OFFERED, 0, id)
    call('HSET', OFFERS, id, cmsgpack.pack({now - age, rest, size, audience, replayed, arg(), arg()}))
  end
  return 'offered'
end

local ops = {}

function ops.append()
  local n, counter, key, print = tonumber(arg()), arg(), arg(), arg()
  local draft = i
  i = i + 4 * n
  if key ~= '' then
    local last = call('GET', P..'once:'..key)
    local entry = last and call('XRANGE', LOG, last..'-0', last..'-0')[1]
    if entry and entry[2][12] == key then
      local known = cmsgpack.unpack(entry[2][16])
      return known[1] == print and known[2] or 'reused'
    end
  end
  if counter ~= '' then
    local held = call('HMGET', META, 'leader', 'counter')
    if held[1] ~= node or tonumber(held[2] or 0) ~= counter - 1 then return {now, 0} end
    call('HSET', META, 'counter', counter)
  end
  local reply = {now, 0}
  for d = 1, n do
    local rest, size, audience, replayed = unpack(ARGV, draft + 1, draft + 4)
    draft = draft + 4
    local id, once, answer = next_id(newest), '', key ~= '' and '+' or ''
    reply[#reply + 1] = id
    reply[#reply + 1] = recipients(audience)
    if key ~= '' and d == n then
      reply[2] = 1
      once, answer = key, cmsgpack.pack({print, reply})
      reply[2] = 0
    end
    add(id, now, rest, size, audience, replayed, once, answer)
  end
  sent = sent + n
  return reply
end

function ops.admit()
  local id, topics, address = arg(), arg(), arg()
  local owner = call('HGET', CLIENTS, id)
  if owner and owner ~= node and is_alive(owner) then return {'taken', owner} end
  if MAX_PER_ADDRESS > 0 and address ~= '' then
    local held = clients_of(address) - call('SISMEMBER', ADDRESS..node..':'..address, id)
    if held >= MAX_PER_ADDRESS then return {'address', held} end
  end
  local count = owner ~= node and active() or 0
  if owner ~= node and count >= MAX then return {'full', count} end
  enter(id, owner, topics, address)
  call('HINCRBY', META, 'total', 1)
  return newest
end

function ops.subscribe()
  local id, topics = arg(), arg()
  if call('HGET', CLIENTS, id) == node then set_topics(id, node, topics) end
  return newest
end

function ops.register()
  local taken = {}
  for _ = 1, tonumber(arg()) do
    local id, topics, address = arg(), arg(), arg()
    local owner = call('HGET', CLIENTS, id)
    if owner and owner ~= node and is_alive(owner) then
      taken[#taken + 1] = id
    else
      enter(id, owner, topics, address)
    end
  end
  return taken
end

function ops.leave()
  remove(arg(), node)
  return 0
end

function ops.draw()  -- rates.py has it once more.
  local name, cost, depth = BUCKET..arg(), tonumber(arg()), tonumber(arg())
  local left = math.min(math.max((call('GET', name) or 0) - now, 0), depth)
  if left + cost > depth then return {0, left} end
  left = left + cost
  call('SET', name, string.format('%.0f', now + left), 'PX', math.ceil(left / 1000))
  return {1, left}
end

function ops.lead()
  local held = call('HMGET', META, 'leader', 'leads_until')
  local ends = tonumber(held[2] or 0)
  if held[1] and held[1] ~= node and is_alive(held[1]) and ends > now and ends <= now + LEASE then
    return -1
  end
  call('HSET', META, 'leader', node, 'leads_until', now + LEASE)
  return tonumber(call('HGET', META, 'counter') or 0)
end

function ops.report() call('HSET', ROW..node, 'messages', arg(), 'slow', arg()); return 0 end

function ops.census()
  local sums = call('HMGET', META, 'total', 'sent', 'messages', 'slow')
  local reply = {active()}
  for k = 1, 4 do reply[k + 1] = tonumber(sums[k] or 0) end
  reply[3] = reply[3] + sent
  for _, one in ipairs(call('ZRANGE', NODES, 0, -1)) do
    local row = call('HMGET', ROW..one, 'messages', 'slow')
    reply[4], reply[5] = reply[4] + (row[1] or 0), reply[5] + (row[2] or 0)
    if one ~= node then reply[#reply + 1] = one end
  end
  return reply
end

function ops.post()
  local to, message = arg(), arg()
  if is_alive(to) then call('XADD', POSTS..to, 'MAXLEN', 1000, '*', 'n', node, 'm', message) end
  return 0
end

function ops.renew()
  call('XTRIM', POSTS..node, 'MINID', '=', arg())
  -- Where Redis's clock has jumped back, no lease may end later than one that is renewed now.
  for _, one in ipairs(call('ZRANGEBYSCORE', NODES, now + LEASE + 1, '+inf')) do
    call('ZADD', NODES, now + LEASE, one)
  end
  remove_some_of_the_dead()
  trim()
  local known = call('HMGET', META, 'total', 'sent', 'messages', 'slow', 'counter', 'started')
  for k = 1, 6 do known[k] = tonumber(known[k] or 0) end
  known[7] = before
  return known
end

function ops.close() put_out(node); return 0 end

if ARGV[13] == 'join' then i = 13; return join() end
if ARGV[13] == 'offer' then i = 13; return offer() end
put_out_the_dead()
if call('HGET', META, 'epoch') ~= epoch or not is_alive(node) then return 'join' end
call('ZADD', NODES, now + LEASE, node)
call('ZADD', TAILS, tail, node)
load()
local replies = {0}
while i < #ARGV do replies[#replies + 1] = ops[arg()]() end
if sent > 0 then
  save()
  call('HINCRBY', META, 'sent', sent)
  if kept > SIZE or bytes > BYTES then trim() end
end
replies[1] = seq
return replies
