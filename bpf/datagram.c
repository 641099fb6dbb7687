/* UDP: services, policy and the resolver at sendmsg(); the addresses an application sees at recvmsg() and
 * getpeername(), the latter for TCP as well (accept() asks it too). */

#define STATE_CONNECTED 1 /* TCP_ESTABLISHED, UDP has it too */

/* PL_R_COUNT: passes untold; `to` is where */
static inline u32 send_from(struct bpf_sock_addr *ctx, const struct pl_addr *dst, u16 port, struct choice *to, struct tale *t)
{
  struct pl_config *c = configuration();
  struct bpf_sock *sk = ctx->sk;
  struct pl_conn *conn;
  struct pl_dial_key k = {};
  struct pl_peers *ps;
  struct pl_member *m;
  struct pl_dest_key known = {};
  u64 cgroup, netns;
  u32 reason, generation, memory;

  if (!c)
    return PL_R_SCHEMA;
  m = current_member(c, &cgroup);
  if (!m)
    return PL_R_UNKNOWN_CGROUP;
  t->identity = m->identity;
  t->workload = m->workload;
  if (m->role == PL_ROLE_AGENT)
    return PL_R_COUNT;
  reason = closed(c);
  if (reason)
    return reason;
  netns = netns_cookie(ctx);
  generation = generation_of(c);
  if (m->role == PL_ROLE_PROXY) {
    /* The resolver answers from its own port on loopback. IPv4 keeps such a source inside the netns by itself; over
     * IPv6 only a workload's address is answered, for clients that bound to theirs. */
    known.addr = *dst;
    known.proto = IPPROTO_UDP;
    if (sk->src_port == PL_PORT_DNS && listeners.lookup(&netns) && (is_v4(dst) || is_loopback(dst) || dests.lookup(&known)))
      return PL_R_COUNT;
    k.netns = netns;
    k.addr = *dst;
    k.port = port;
    return dials.lookup(&k) ? PL_R_PROXY_DIAL : PL_R_DIAL_DENIED;
  }
  conn = conns.sk_storage_get(sk, 0, 0);
  if (conn && conn->cgroup && conn->cgroup != cgroup)
    return PL_R_FOREIGN_SOCKET;
  ps = peers.sk_storage_get(sk, 0, 0);
  /* send() on an IPv6 socket connected to a v4-mapped address comes by here, with what connect() made of it */
  if (ps && sk->family == AF_INET6 && sk->state == STATE_CONNECTED && is_v4(dst) && sk->dst_ip4 == dst->w[3] &&
      ntoh16((u16)sk->dst_port) == port && peer_by_rewritten(ps, dst, port))
    return PL_R_COUNT;
  reason = choose(c, m, netns, (u32)(socket_cookie(ctx) * 0x9e3779b97f4a7c15ull >> 32), dst, port, IPPROTO_UDP, to);
  t->dst_workload = to->workload;
  t->rule = to->rule;
  if (reason <= PL_R_ALLOWED_MAX) {
    memory = remember_peer(sk, netns, generation, m, dst, port, to);
    return memory == NEW ? reason : memory == KNOWN ? PL_R_COUNT : PL_R_MAP_FULL; /* told once for each destination */
  }
  if (ps && ps->served && reason != PL_R_RESERVED_PORT) { /* perhaps an answer: egress.c knows both ends */
    to->to = *dst;
    to->port = port;
    return PL_R_COUNT;
  }
  return reason;
}

static inline bool send_verdict(struct bpf_sock_addr *ctx, struct pl_addr *asked, struct choice *to)
{
  struct tale t = {};
  u32 reason;

  settle(asked);
  to->to = *asked;
  to->port = ntoh16((u16)ctx->user_port);
  t.dst = *asked;
  t.dport = to->port;
  reason = send_from(ctx, &t.dst, t.dport, to, &t);
  if (reason == PL_R_COUNT)
    return true;
  t.proto = IPPROTO_UDP;
  t.hook = PL_HOOK_SENDMSG;
  tell(reason, &t);
  return reason <= PL_R_ALLOWED_MAX;
}

int on_sendmsg4(struct bpf_sock_addr *ctx)
{
  struct choice to = {};
  struct pl_addr asked;

  set_v4(&asked, ctx->user_ip4);
  if (!send_verdict(ctx, &asked, &to) || !is_v4(&to.to))
    return 0;
  ctx->user_ip4 = to.to.w[3];
  BARRIER;
  ctx->user_port = hton16(to.port);
  return 1;
}

int on_sendmsg6(struct bpf_sock_addr *ctx)
{
  struct choice to = {};
  struct pl_addr asked;

  asked.w[0] = ctx->user_ip6[0];
  asked.w[1] = ctx->user_ip6[1];
  asked.w[2] = ctx->user_ip6[2];
  asked.w[3] = ctx->user_ip6[3];
  if (!send_verdict(ctx, &asked, &to))
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

/* What the application shall see instead of `seen`. False: as it is. */
static inline bool shown_for(struct bpf_sock_addr *ctx, const struct pl_addr *seen, u16 port, struct pl_addr *shown, u16 *shown_port)
{
  struct bpf_sock *sk = ctx->sk;
  struct pl_peers *ps;
  struct pl_conn *conn;
  struct pl_peer *p;

  if (ctx->protocol == IPPROTO_UDP) {
    ps = peers.sk_storage_get(sk, 0, 0);
    p = ps ? peer_by_rewritten(ps, seen, port) : NULL;
    if (!p)
      return false;
    *shown = p->asked;
    *shown_port = p->asked_port;
    return true;
  }
  conn = conns.sk_storage_get(sk, 0, 0);
  if (!conn || !conn->peer_port)
    return false;
  *shown = conn->peer;
  *shown_port = conn->peer_port;
  return true;
}

static inline void show4(struct bpf_sock_addr *ctx)
{
  struct pl_addr seen, shown;
  u16 port;

  set_v4(&seen, ctx->user_ip4);
  if (!shown_for(ctx, &seen, ntoh16((u16)ctx->user_port), &shown, &port) || !is_v4(&shown))
    return;
  ctx->user_ip4 = shown.w[3];
  BARRIER;
  ctx->user_port = hton16(port);
}

static inline void show6(struct bpf_sock_addr *ctx)
{
  struct pl_addr seen, shown;
  u16 port;

  seen.w[0] = ctx->user_ip6[0];
  seen.w[1] = ctx->user_ip6[1];
  seen.w[2] = ctx->user_ip6[2];
  seen.w[3] = ctx->user_ip6[3];
  if (!shown_for(ctx, &seen, ntoh16((u16)ctx->user_port), &shown, &port))
    return;
  ctx->user_ip6[0] = shown.w[0];
  BARRIER;
  ctx->user_ip6[1] = shown.w[1];
  BARRIER;
  ctx->user_ip6[2] = shown.w[2];
  BARRIER;
  ctx->user_ip6[3] = shown.w[3];
  BARRIER;
  ctx->user_port = hton16(port);
}

int on_recvmsg4(struct bpf_sock_addr *ctx) { show4(ctx); return 1; }
int on_recvmsg6(struct bpf_sock_addr *ctx) { show6(ctx); return 1; }
int on_getpeername4(struct bpf_sock_addr *ctx) { show4(ctx); return 1; }
int on_getpeername6(struct bpf_sock_addr *ctx) { show6(ctx); return 1; }
