/* What several hooks share: addresses, who somebody is, counting and telling, the policy questions. */

#define ntoh16(x) __builtin_bswap16(x)
#define hton16(x) __builtin_bswap16(x)
#define ntoh32(x) __builtin_bswap32(x)
#define hton32(x) __builtin_bswap32(x)
#define MAPPED hton32(0xffff)
#define BARRIER asm volatile("" ::: "memory") /* or clang merges two stores into the context: the verifier refuses */
#define KEEP_LOOP _Pragma("clang loop unroll(disable)")

#define true 1
#define false 0
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define TCP_STATE_ESTABLISHED 1
#define TCP_STATE_CLOSE 7
#define TCP_STATE_LISTEN 10
#define PORT_DOMAIN 53
#define LEVELS_MAX 16
#define SERVICE_BITS 0x1fffffff /* of a backend group, see mesh/dataplane.py */
#define GROUP_DIRECT 0x80000000

/* BCC 0.26 lacks these, or has them with a shorter result */
static u64 (*netns_cookie)(void *ctx) = (void *)122;
static u64 (*socket_cookie)(void *ctx) = (void *)46;
static u64 (*boot_ns)(void) = (void *)125;

static inline struct pl_config *configuration(void)
{
  u32 zero = 0;
  return config.lookup(&zero);
}

/* Read before the maps are asked: a verdict is stamped with the generation it was asked under, never a later one */
static inline u32 generation_of(struct pl_config *c)
{
  return *(volatile u32 *)&c->generation;
}

/* ---- addresses */

static inline void set_v4(struct pl_addr *a, u32 ip)
{
  a->w[0] = 0;
  a->w[1] = 0;
  a->w[2] = MAPPED;
  a->w[3] = ip;
}

static inline bool is_v4(const struct pl_addr *a)
{
  return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == MAPPED;
}

static inline bool is_loopback(const struct pl_addr *a)
{
  if (is_v4(a))
    return (a->w[3] & hton32(0xff000000)) == hton32(0x7f000000);
  return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == hton32(1);
}

static inline bool is_zero(const struct pl_addr *a)
{
  return (a->w[0] | a->w[1] | a->w[2] | a->w[3]) == 0;
}

static inline bool same_addr(const struct pl_addr *a, const struct pl_addr *b)
{
  return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

/* connect() to the unspecified address means loopback */
static inline void settle(struct pl_addr *a)
{
  if (is_v4(a) && a->w[3] == 0)
    a->w[3] = hton32(0x7f000001);
  else if (is_zero(a))
    a->w[3] = hton32(1);
}

static inline void loopback_like(struct pl_addr *to, const struct pl_addr *like)
{
  if (is_v4(like)) {
    set_v4(to, hton32(0x7f000001));
  } else {
    to->w[0] = 0;
    to->w[1] = 0;
    to->w[2] = 0;
    to->w[3] = hton32(1);
  }
}

/* ---- counting and telling: neither may hold up a verdict */

static inline void count(u32 reason)
{
  u64 *n = counters.lookup(&reason);
  if (n)
    __sync_fetch_and_add(n, 1); /* a softirq may come between */
}

struct tale {
  struct pl_addr src, dst;
  u32 identity, workload, dst_workload, rule;
  u16 sport, dport;
  u8 proto, hook;
};

/* Flows are for people: each CPU tells so many of a kind in a window (2^30 ns), then only counts. The reader of the ring
 * would otherwise cost a busy node more than its verdicts do. */
#define TOLD_ALLOWED_MAX 64
#define TOLD_DENIED_MAX 512
#define TOLD_IDENTITY_MAX 128 /* denials of one identity, over all CPUs */

static inline bool may_tell(bool allowed)
{
  u32 zero = 0;
  struct pl_told *told = tolds.lookup(&zero);
  u64 window = boot_ns() >> 30;

  if (!told)
    return false;
  if (told->window != window) {
    told->window = window;
    told->allowed = 0;
    told->denied = 0;
  }
  if (allowed)
    return told->allowed++ < TOLD_ALLOWED_MAX;
  return told->denied++ < TOLD_DENIED_MAX;
}

/* NULL: the map is full */
static inline struct pl_usage *usage_of(u32 identity)
{
  struct pl_usage *u = usage.lookup(&identity), none = {};

  if (u)
    return u;
  usage.insert(&identity, &none);
  return usage.lookup(&identity);
}

/* One identity's denials leave room for the others' */
static inline bool may_tell_of(u32 identity)
{
  struct pl_usage *u = usage_of(identity);
  u64 window = boot_ns() >> 30;

  if (!u)
    return false;
  if (u->window != window) { /* two CPUs may both do so: a few more are told */
    u->window = window;
    u->told = 0;
  }
  if (u->told >= TOLD_IDENTITY_MAX)
    return false;
  __sync_fetch_and_add(&u->told, 1);
  return true;
}

static inline void tell(u32 reason, const struct tale *t)
{
  struct pl_event *e;

  count(reason);
  if ((reason > PL_R_ALLOWED_MAX && !may_tell_of(t->identity)) || !may_tell(reason <= PL_R_ALLOWED_MAX)) {
    count(PL_R_EVENTS_SAMPLED);
    return;
  }
  e = events.ringbuf_reserve(sizeof(struct pl_event));
  if (!e) {
    count(PL_R_EVENTS_LOST);
    return;
  }
  e->time_ns = boot_ns();
  e->src = t->src;
  e->dst = t->dst;
  e->verdict = reason <= PL_R_ALLOWED_MAX;
  e->reason = reason;
  e->src_identity = t->identity;
  e->src_workload = t->workload;
  e->dst_workload = t->dst_workload;
  e->rule = t->rule;
  e->sport = t->sport;
  e->dport = t->dport;
  e->proto = t->proto;
  e->hook = t->hook;
  e->pad = 0;
  events.ringbuf_submit(e, 0);
}

/* ---- who: the deepest ancestor that is a member. `id` is its cgroup id, 0 when nobody's */

static inline struct pl_member *current_member(struct pl_config *c, u64 *id)
{
  struct pl_member *m;
  u32 level = c->level_hi;

  *id = 0;
  KEEP_LOOP
  for (int i = 0; i < LEVELS_MAX; i++) {
    u64 cgroup = bpf_get_current_ancestor_cgroup_id(level);
    if (cgroup) {
      m = members.lookup(&cgroup);
      if (m) {
        *id = cgroup;
        return m;
      }
    }
    if (level <= c->level_lo)
      break;
    level--;
  }
  return NULL;
}

static inline struct pl_member *owner_member(struct pl_config *c, struct __sk_buff *skb)
{
  struct pl_member *m;
  u32 level = c->level_hi;

  KEEP_LOOP
  for (int i = 0; i < LEVELS_MAX; i++) {
    u64 cgroup = bpf_skb_ancestor_cgroup_id(skb, level);
    if (cgroup) {
      m = members.lookup(&cgroup);
      if (m)
        return m;
    }
    if (level <= c->level_lo)
      break;
    level--;
  }
  return NULL;
}

/* The deny that holds for everything new of a workload, or 0 */
static inline u32 closed(struct pl_config *c)
{
  if (c->schema != PL_SCHEMA)
    return PL_R_SCHEMA;
  if (c->lease_until_ns && boot_ns() > c->lease_until_ns)
    return PL_R_LEASE_EXPIRED;
  return 0;
}

/* ---- what may be */

static inline u32 verdict_of(u32 workload, u32 identity, u16 port, u8 proto, u32 *rule)
{
  struct pl_policy_key k = {};
  struct pl_policy *p;

  k.workload = workload;
  k.identity = identity;
  k.port = port;
  k.proto = proto;
  p = policy.lookup(&k);
  if (!p)
    return PL_DENY;
  *rule = p->rule;
  return p->verdict;
}

static inline bool outbound_allowed(struct pl_config *c, const struct pl_addr *dst, u16 port)
{
  struct pl_egress_key k = {};
  struct pl_egress *e;

  k.prefixlen = 128;
  k.addr = *dst;
  e = egress.lookup(&k);
  if (!e)
    return c->outbound_allow == 1;
  if (e->allow != 1)
    return false;
  if (e->nports == 0)
    return true;
  KEEP_LOOP
  for (u32 i = 0; i < PL_EGRESS_PORTS; i++) {
    if (i < e->nports && e->ports[i] == port)
      return true;
  }
  return false;
}

/* Whether a name that the workload asked for was answered with this address. `netns` 0: of a workload; `workload` 0: of
 * whoever lives in a netns. PL_R_OUTBOUND_DENIED: no. */
static inline u32 granted(u64 netns, u32 workload, const struct pl_addr *dst, u16 port, u8 proto, u32 *rule)
{
  struct pl_grant_key k = {};
  struct pl_grant *g;

  k.netns = netns;
  k.addr = *dst;
  k.workload = workload;
  k.port = port;
  k.proto = proto;
  g = grants.lookup(&k);
  if (!g)
    return PL_R_OUTBOUND_DENIED;
  *rule = g->rule;
  return boot_ns() < g->until_ns ? PL_R_OUTBOUND_ALLOWED : PL_R_GRANT_EXPIRED;
}

/* What is open goes on past the grant's time, for as long as the agent leaves the entry: the policy names it still */
static inline bool goes_on(struct pl_config *c, u32 workload, const struct pl_addr *dst, u16 port, u8 proto)
{
  u32 rule;

  return outbound_allowed(c, dst, port) || granted(0, workload, dst, port, proto, &rule) != PL_R_OUTBOUND_DENIED;
}

/* The key of a flow. The netns only where loopback makes tuples repeat. */
static inline void set_flow(struct pl_flow *f, u64 netns, const struct pl_addr *src, u16 sport, const struct pl_addr *dst, u16 dport)
{
  f->netns = is_loopback(src) || is_loopback(dst) ? netns : 0;
  f->src = *src;
  f->dst = *dst;
  f->sport = sport;
  f->dport = dport;
  f->pad = 0;
}
