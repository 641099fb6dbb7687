/* Where a workload's connection or datagram may go (connect.c, datagram.c), and whom its UDP sockets talk to. */

struct choice {
  struct pl_addr to;
  u32 service, workload, rule;
  u16 port;
  u8 kind, pad;
};

static inline u32 to_listener(u64 netns, const struct pl_addr *dst, u16 port, u8 kind, struct choice *out)
{
  if (!listeners.lookup(&netns))
    return PL_R_NO_LISTENER;
  loopback_like(&out->to, dst);
  out->port = port;
  out->kind = kind;
  return PL_R_CAPTURED;
}

/* seed: picks the backend. Returns a pl_reason; `out` is complete when it is an admission. */
static inline u32 choose(struct pl_config *c, struct pl_member *m, u64 netns, u32 seed, const struct pl_addr *dst, u16 port,
                         u8 proto, struct choice *out)
{
  struct pl_dest_key dk = {};
  struct pl_backend_key bk = {};
  struct pl_backend *b;
  struct pl_dest *d;
  u32 verdict;

  out->to = *dst;
  out->port = port;
  if (port == PL_PORT_OUTBOUND || port == PL_PORT_HBONE || (port == PL_PORT_DNS && is_loopback(dst)))
    return PL_R_RESERVED_PORT;
  if (port == PORT_DOMAIN) /* whatever the server: the mesh's resolver answers */
    return to_listener(netns, dst, PL_PORT_DNS, proto == IPPROTO_UDP ? PL_CONN_DNS : PL_ARRIVAL_CAPTURED, out);

  dk.addr = *dst;
  dk.port = port;
  dk.proto = proto;
  d = dests.lookup(&dk);
  if (!d) {
    dk.port = 0;
    d = dests.lookup(&dk);
  }
  if (d) {
    out->service = d->service & GROUP_DIRECT ? 0 : d->service & SERVICE_BITS;
    if (d->kind == PL_DEST_DENY)
      return d->reason > PL_R_ALLOWED_MAX && d->reason < PL_R_COUNT ? d->reason : PL_R_PORT_UNDECLARED;
    if (d->kind == PL_DEST_NATIVE) {
      if (!d->backends)
        return PL_R_NO_BACKEND;
      bk.service = d->service;
      bk.port = port;
      bk.slot = seed % d->backends;
      b = backends.lookup(&bk);
      if (!b)
        return PL_R_MAP_MISS;
      out->workload = b->workload;
      verdict = verdict_of(b->workload, m->identity, b->port, proto, &out->rule);
      if (verdict == PL_ALLOW) {
        out->to = b->addr;
        out->port = b->port;
        out->kind = PL_ARRIVAL_NATIVE;
        return PL_R_NATIVE_ALLOWED;
      }
      if (verdict != PL_L7)
        return PL_R_POLICY_DENIED;
    } else if (d->kind != PL_DEST_PROXY) {
      return PL_R_MAP_MISS;
    }
    if (proto != IPPROTO_TCP)
      return PL_R_UDP_REMOTE;
    return to_listener(netns, dst, PL_PORT_OUTBOUND, PL_ARRIVAL_CAPTURED, out);
  }

  if (is_loopback(dst) && netns == m->netns && netns != c->host_netns) {
    out->kind = PL_ARRIVAL_LOCAL;
    return PL_R_NATIVE_ALLOWED;
  }
  if (!outbound_allowed(c, dst, port)) {
    verdict = granted(0, m->workload, dst, port, proto, &out->rule);
    if (verdict != PL_R_OUTBOUND_ALLOWED)
      return verdict;
  }
  out->kind = is_loopback(dst) ? PL_ARRIVAL_LOCAL : PL_CONN_OUTBOUND;
  return PL_R_OUTBOUND_ALLOWED;
}

/* ---- whom a UDP socket talks to */

static inline void drop_datagram(u64 netns, struct pl_peer *p)
{
  struct pl_flow f = {};

  if (!p->recorded)
    return;
  set_flow(&f, netns, &p->src, p->sport, &p->to, p->port);
  datagrams.delete(&f);
  p->recorded = 0;
}

static inline struct pl_peer *peer_by_rewritten(struct pl_peers *ps, const struct pl_addr *to, u16 port)
{
  u32 at = ps->next;

  KEEP_LOOP
  for (int i = 0; i < PL_PEERS; i++) { /* newest first */
    at--;
    struct pl_peer *p = &ps->at[at & (PL_PEERS - 1)];
    if (p->kind && p->port == port && same_addr(&p->to, to))
      return p;
  }
  return NULL;
}

/* Two threads that send at once may take the same slot: both destinations were allowed, at worst a reply is dropped */
static inline struct pl_peer *next_peer(struct pl_peers *ps)
{
  u32 at = ps->next;

  ps->next = at + 1;
  return &ps->at[at & (PL_PEERS - 1)];
}

enum memory { FORGOTTEN, KNOWN, NEW }; /* FORGOTTEN: no room */

/* Remember a rewritten destination for replies and names. A repeat refreshes its entry. */
static inline u32 remember_peer(struct bpf_sock *sk, u64 netns, u32 generation, struct pl_member *m, const struct pl_addr *asked,
                                 u16 asked_port, const struct choice *to)
{
  struct pl_peers *ps = peers.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  struct pl_peer *p;
  u32 result = KNOWN;

  if (!ps)
    return FORGOTTEN;
  p = peer_by_rewritten(ps, &to->to, to->port);
  if (!p || p->asked_port != asked_port || !same_addr(&p->asked, asked)) {
    p = next_peer(ps);
    drop_datagram(netns, p);
    result = NEW;
  }
  p->asked = *asked;
  p->asked_port = asked_port;
  p->to = to->to;
  p->port = to->port;
  p->workload = to->workload;
  p->identity = m->identity;
  p->generation = generation;
  p->kind = to->kind;
  return result;
}
