/* connect(): where a workload's connection may go, and how. Both families and v4-mapped share one path. */

/* So many connections of one identity may be under way: their records share one map */
static inline bool connects_spent(struct pl_config *c, u32 identity)
{
  struct pl_usage *u = usage.lookup(&identity);
  u32 most = c->connects_max ? c->connects_max : PL_CONNECTS_MAX;

  return u && u->arriving >= most;
}

/* What is known of a socket that is nothing yet: who made it. One that was something gets new memory: a packet of its former
 * connection may be under judgement. NULL: there is no memory. */
static inline struct pl_conn *blank(struct bpf_sock *sk)
{
  struct pl_conn *conn = conns.sk_storage_get(sk, 0, 0), fresh = {};

  if (conn && !conn->kind)
    return conn;
  if (conn) {
    fresh.cgroup = conn->cgroup;
    fresh.netns = conn->netns;
  }
  conns.sk_storage_delete(sk);
  origins.sk_storage_delete(sk);
  leave_express(sk);
  return conns.sk_storage_get(sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
}

static inline u32 dial_of_proxy(struct bpf_sock_addr *ctx, struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn,
                                const struct pl_addr *dst, u16 port)
{
  struct pl_dial_key k = {};
  struct pl_caller *caller;
  u32 shut = closed(c), kind = PL_CONN_TRUSTED;

  if (shut)
    return shut;
  k.netns = netns_cookie(ctx);
  k.addr = *dst;
  k.port = port;
  if (!dials.lookup(&k))
    return PL_R_DIAL_DENIED;
  if (ctx->protocol != IPPROTO_TCP)
    return PL_R_PROXY_DIAL;
  if (port != PL_PORT_HBONE && port != PORT_DOMAIN) { /* an endpoint: its server shall see who calls */
    caller = callers.sk_storage_get(sk, 0, 0);
    if (!caller)
      return PL_R_NO_CALLER;
    if (connects_spent(c, caller->identity))
      return PL_R_BUDGET_CONNECTS;
    kind = PL_ARRIVAL_PROXY;
    conn->identity = caller->identity;
  }
  conn->port = port;
  conn->proto = IPPROTO_TCP;
  BARRIER;
  conn->kind = kind;
  return PL_R_PROXY_DIAL;
}

/* Leaves on the socket what sockops.c sends ahead of the SYN */
static inline bool remember_connection(struct bpf_sock *sk, struct pl_conn *conn, struct pl_member *m, u32 generation,
                                       u64 cgroup, u64 netns, const struct pl_addr *asked, u16 asked_port, const struct choice *to)
{
  struct pl_origin o = {};

  if (to->kind == PL_ARRIVAL_CAPTURED) {
    o.dst = *asked;
    o.dst_port = asked_port;
    o.cgroup = cgroup;
    o.netns = netns;
    o.workload = m->workload;
    o.identity = m->identity;
    o.service = to->service;
    if (!origins.sk_storage_get(sk, &o, BPF_SK_STORAGE_GET_F_CREATE))
      return false;
  }
  conn->workload = to->workload;
  conn->identity = m->identity;
  conn->source = m->workload;
  conn->port = to->port;
  conn->proto = IPPROTO_TCP;
  conn->peer = *asked;
  conn->peer_port = asked_port;
  conn->generation = generation;
  BARRIER;
  conn->kind = to->kind;
  return true;
}

/* getaddrinfo() sorts addresses by the source each would have: it connects a datagram socket to the service's port, or to
 * port 0 when none was asked for, and sends nothing. Where only TCP is spoken that is no attempt to talk. It passes
 * untold and is not remembered, so that egress.c drops whatever is sent on it after all. */
static inline bool only_probes(const struct pl_addr *dst, u16 port)
{
  struct pl_dest_key k = {};

  if (port == 0)
    return true;
  if (port == PORT_DOMAIN || port == PL_PORT_OUTBOUND || port == PL_PORT_HBONE)
    return false;
  k.addr = *dst;
  k.port = port;
  k.proto = IPPROTO_TCP;
  if (!dests.lookup(&k))
    return false;
  k.proto = IPPROTO_UDP;
  return !dests.lookup(&k);
}

static inline u32 connect_from(struct bpf_sock_addr *ctx, const struct pl_addr *dst, u16 port, struct choice *to, struct tale *t)
{
  struct pl_config *c = configuration();
  struct bpf_sock *sk = ctx->sk;
  struct pl_member *m;
  struct pl_conn *conn;
  u64 cgroup, netns;
  u32 reason, generation;

  conn = blank(sk); /* a socket may connect twice */
  if (!conn)
    return PL_R_MAP_FULL;
  if (!c)
    return PL_R_SCHEMA;
  m = current_member(c, &cgroup);
  if (!m)
    return PL_R_UNKNOWN_CGROUP;
  t->identity = m->identity;
  t->workload = m->workload;
  if (m->role == PL_ROLE_AGENT)
    return PL_R_COUNT; /* passes untold */
  if (m->role == PL_ROLE_PROXY)
    return dial_of_proxy(ctx, c, sk, conn, dst, port);
  reason = closed(c);
  if (reason)
    return reason;
  /* Nobody known: made before the hooks stood, accepted, or an MPTCP subflow. Generation 0 makes egress.c compare its owner. */
  if (conn->cgroup && conn->cgroup != cgroup)
    return PL_R_FOREIGN_SOCKET;
  netns = netns_cookie(ctx);
  generation = generation_of(c);
  if (ctx->protocol == IPPROTO_TCP) {
    reason = choose(c, m, netns, bpf_get_prandom_u32(), dst, port, IPPROTO_TCP, to);
    t->dst_workload = to->workload;
    t->rule = to->rule;
    if (reason <= PL_R_ALLOWED_MAX && connects_spent(c, m->identity))
      return PL_R_BUDGET_CONNECTS;
    if (reason <= PL_R_ALLOWED_MAX && !remember_connection(sk, conn, m, conn->cgroup ? generation : 0, cgroup, netns, dst, port, to))
      return PL_R_MAP_FULL;
    return reason;
  }
  if (ctx->protocol != IPPROTO_UDP)
    return PL_R_SOCKET_TYPE;
  if (only_probes(dst, port))
    return PL_R_COUNT;
  reason = choose(c, m, netns, (u32)(socket_cookie(ctx) * 0x9e3779b97f4a7c15ull >> 32), dst, port, IPPROTO_UDP, to);
  t->dst_workload = to->workload;
  t->rule = to->rule;
  if (reason <= PL_R_ALLOWED_MAX && remember_peer(sk, netns, generation, m, dst, port, to) == FORGOTTEN)
    return PL_R_MAP_FULL;
  return reason;
}

/* Whether to pass; `to` is where */
static inline bool connect_verdict(struct bpf_sock_addr *ctx, const struct pl_addr *asked, struct choice *to)
{
  struct tale t = {};
  u32 reason;

  to->to = *asked;
  to->port = ntoh16((u16)ctx->user_port);
  t.dst = *asked;
  t.dport = to->port;
  t.proto = ctx->protocol;
  t.hook = PL_HOOK_CONNECT;
  settle(&t.dst);
  reason = connect_from(ctx, &t.dst, t.dport, to, &t);
  if (reason == PL_R_COUNT)
    return true;
  tell(reason, &t);
  return reason <= PL_R_ALLOWED_MAX;
}

int on_connect4(struct bpf_sock_addr *ctx)
{
  struct choice to = {};
  struct pl_addr asked;

  set_v4(&asked, ctx->user_ip4);
  if (!connect_verdict(ctx, &asked, &to))
    return 0;
  if (!is_v4(&to.to))
    return 0;
  ctx->user_ip4 = to.to.w[3];
  BARRIER;
  ctx->user_port = hton16(to.port);
  return 1;
}

int on_connect6(struct bpf_sock_addr *ctx)
{
  struct choice to = {};
  struct pl_addr asked;

  asked.w[0] = ctx->user_ip6[0];
  asked.w[1] = ctx->user_ip6[1];
  asked.w[2] = ctx->user_ip6[2];
  asked.w[3] = ctx->user_ip6[3];
  if (!connect_verdict(ctx, &asked, &to))
    return 0;
  ctx->user_ip6[0] = to.to.w[0];
  BARRIER;
  ctx->user_ip6[1] = to.to.w[1];
  BARRIER;
  ctx->user_ip6[2] = to.to.w[2];
  BARRIER;
  ctx->user_ip6[3] = to.to.w[3];
  BARRIER;
  ctx->user_port = hton16(to.port);
  return 1;
}
