"""Law: the changes of an index in Redis, each a Lua script that the server runs as a whole; ``redis_index`` tells of the keys.

A script's only key is the prefix of a store's keys, which all lie in its slot. Values come from a stranger: a block's key of
another type, and a number that is none, are passed over. A script that adds something writes that first, for a server without
memory refuses a script at its first write only.
"""

_COMMON = """
local P = KEYS[1]
local counters, all, pinned, sums = P .. 'counters', P .. 'all', P .. 'pinned', P .. 'sums'
local function at(kind, name) return P .. kind .. ':' .. name end
local function leaves(tenant) return tenant == '' and P .. 'leaves' or at('leaves', tenant) end
local function there(name) return redis.call('TYPE', at('block', name)).ok == 'hash' end
local function field(name, what) return redis.call('HGET', at('block', name), what) or '' end
local function weigh(tenant, size)
    redis.call('HINCRBY', counters, 'bytes', size)
    if tenant ~= '' then redis.call('HINCRBY', sums, tenant, size) end
end
-- Note a block among those that may be evicted, if it is one.
local function rank(name)
    if not there(name) or field(name, 'pinned') ~= '0' or redis.call('SCARD', at('children', name)) > 0 then return end
    local used = field(name, 'used')
    if string.match(used, '^%d+%.?%d*$') then redis.call('ZADD', leaves(field(name, 'tenant')), used, name) end
end
local function forget(name, parent)
    local tenant, size = field(name, 'tenant'), field(name, 'size')
    redis.call('DEL', at('block', name))
    redis.call('ZREM', all, name)
    redis.call('ZREM', leaves(tenant), name)
    redis.call('SREM', pinned, name)
    redis.call('SREM', at('children', parent), name)
    if string.match(size, '^%d+$') then weigh(tenant, '-' .. size) end
    rank(parent)
end
"""

# ARGV: root, JSON of label and settings, tenant. A tenant's root may have blocks already that were found by their files.
ADD_ROOT = (
    _COMMON
    + """
local root, tenant = ARGV[1], ARGV[3]
redis.call('HSETNX', P .. 'roots', root, ARGV[2])
if tenant == '' or redis.call('HSETNX', P .. 'owners', root, tenant) == 0 then return end
local names = {root}
while #names > 0 do
    for _, name in ipairs(redis.call('SMEMBERS', at('children', table.remove(names)))) do
        if there(name) and field(name, 'root') == root and field(name, 'tenant') == '' then
            local size = field(name, 'size')
            redis.call('HSET', at('block', name), 'tenant', tenant)
            redis.call('ZREM', leaves(''), name)
            if string.match(size, '^%d+$') then redis.call('HINCRBY', sums, tenant, size) end
            rank(name)
            names[#names + 1] = name
        end
    end
end
"""
)

# ARGV: name, parent, root, start, used, size, the place of the files or '', then the fields of the row.
ADD = (
    _COMMON
    + """
local name, parent = ARGV[1], ARGV[2]
if redis.call('EXISTS', at('block', name)) == 1 then
    redis.call('DEL', at('lease', name))
    return 0
end
local tenant = redis.call('HGET', P .. 'owners', ARGV[3]) or ''
redis.call('HSET', at('block', name), 'tenant', tenant, unpack(ARGV, 8))
redis.call('DEL', at('lease', name))
if ARGV[7] ~= '' then redis.call('SETNX', P .. 'data', ARGV[7]) end
redis.call('ZADD', all, ARGV[4], name)
redis.call('SADD', at('children', parent), name)
if there(parent) then redis.call('ZREM', leaves(field(parent, 'tenant')), parent) end
rank(name)
weigh(tenant, ARGV[6])
return 1
"""
)

# ARGV: name, parent, file ('' any), 1 if only an unused block is removed.
REMOVE = (
    _COMMON
    + """
if not there(ARGV[1]) or (ARGV[3] ~= '' and field(ARGV[1], 'file') ~= ARGV[3]) then return 0 end
if ARGV[4] == '1' then
    local used = field(ARGV[1], 'pinned') ~= '0' or field(ARGV[1], 'used') ~= field(ARGV[1], 'created')
    if used or redis.call('SCARD', at('children', ARGV[1])) > 0 then return 0 end
end
forget(ARGV[1], ARGV[2])
return 1
"""
)

# ARGV: time, hit, number of names, names ..., counters and what is added to them ...
TOUCH = (
    _COMMON
    + """
local names = tonumber(ARGV[3])
for i = 4, 3 + names do
    local name = ARGV[i]
    if there(name) then
        redis.call('HSET', at('block', name), 'used', ARGV[1])
        redis.call('HINCRBY', at('block', name), 'hits', ARGV[2])
        redis.call('ZADD', leaves(field(name, 'tenant')), 'XX', ARGV[1], name)
    end
end
for i = 4 + names, #ARGV, 2 do redis.call('HINCRBY', counters, ARGV[i], ARGV[i + 1]) end
"""
)

# ARGV: name, 0 or 1.
PIN = (
    _COMMON
    + """
if not there(ARGV[1]) then return 0 end
redis.call('HSET', at('block', ARGV[1]), 'pinned', ARGV[2])
if ARGV[2] == '1' then
    redis.call('SADD', pinned, ARGV[1])
    redis.call('ZREM', leaves(field(ARGV[1], 'tenant')), ARGV[1])
else
    redis.call('SREM', pinned, ARGV[1])
    rank(ARGV[1])
end
return 1
"""
)

# ARGV: name, who wants the lease, milliseconds.
LEASE = (
    _COMMON
    + """
if redis.call('EXISTS', at('block', ARGV[1])) == 1 then return 0 end
return redis.call('SET', at('lease', ARGV[1]), ARGV[2], 'NX', 'PX', ARGV[3]) and 1 or 0
"""
)

# ARGV: name, who has the lease.
RELEASE = (
    _COMMON
    + """
if redis.call('GET', at('lease', ARGV[1])) == ARGV[2] then redis.call('DEL', at('lease', ARGV[1])) end
"""
)

# ARGV: time, most blocks. Returns name, file, size and why ("expired", "evicted") of each block that it removed, in one list.
EVICT = (
    _COMMON
    + """
local now, most, gone, count = tonumber(ARGV[1]), tonumber(ARGV[2]), {}, 0
local limits, found = {}, redis.call('HGETALL', counters)
for i = 1, #found, 2 do limits[found[i]] = tonumber(found[i + 1]) end
local tenants, held, total = {''}, {}, limits['bytes'] or 0
found, held[''] = redis.call('HGETALL', sums), total
for i = 1, #found, 2 do
    tenants[#tenants + 1] = found[i]
    held[found[i]] = tonumber(found[i + 1]) or 0
    held[''] = held[''] - held[found[i]]
end
local function coldest(tenant)
    while true do
        local leaf = redis.call('ZRANGE', leaves(tenant), 0, 0, 'WITHSCORES')
        if #leaf == 0 then return nil end
        if there(leaf[1]) and field(leaf[1], 'tenant') == tenant then return leaf[1], tonumber(leaf[2]) end
        redis.call('ZREM', leaves(tenant), leaf[1])
    end
end
local function drop(tenant, name, why)
    local size = field(name, 'size')
    local bytes = string.match(size, '^%d+$') and tonumber(size) or 0
    for _, text in ipairs({name, field(name, 'file'), size, why}) do gone[#gone + 1] = text end
    forget(name, field(name, 'parent'))
    held[tenant], total = held[tenant] - bytes, total - bytes
    count = count + 1
end
for _, tenant in ipairs(tenants) do
    local age = math.min(limits['max_age'] or math.huge, limits['max_age:' .. tenant] or math.huge)
    while age < math.huge and count < most do
        local name, used = coldest(tenant)
        if not name or used >= now - age then break end
        drop(tenant, name, 'expired')
    end
    while held[tenant] > (limits['max_bytes:' .. tenant] or math.huge) and count < most do
        local name = coldest(tenant)
        if not name then break end
        drop(tenant, name, 'evicted')
    end
end
local stuck = {}
while total > (limits['max_bytes'] or math.huge) and count < most do
    local largest
    for _, tenant in ipairs(tenants) do
        if not stuck[tenant] and (not largest or held[tenant] > held[largest]) then largest = tenant end
    end
    if not largest then break end
    local name = coldest(largest)
    if name then drop(largest, name, 'evicted') else stuck[largest] = true end
end
return gone
"""
)
