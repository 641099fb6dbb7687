/* What reaches a workload's sockets: connections this kernel knows the caller of, answers, and what policy lets in
 * from outside. Callers are known by record alone, never by address. */

/* connect.c asked the policy this very question, under this generation: the listener is of the workload it was asked for. Never
 * written here: the record may be another connection's by then. */
static inline bool agreed(struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn, struct __sk_buff *skb)
{
  u64 owner = heard(c, sk, conn);
  struct packet p = {};
  struct pl_arrival *a;
  struct pl_flow f;

  if (!owner || !parse(skb, &p) || p.proto != IPPROTO_TCP)
    return false;
  set_flow(&f, conn->netns, &p.src, p.sport, &p.dst, p.dport);
  a = arriving.lookup(&f);
  return a && *(volatile u64 *)&a->agreed == owner;
}

static inline u32 tcp_in(struct pl_config *c, struct pl_member *owner, struct bpf_sock *sk, struct pl_conn *conn, const struct packet *p,
                         struct tale *t)
{
  struct pl_flow f = {};
  struct pl_arrival *a;
  u32 verdict;

  if (sk->state != TCP_STATE_LISTEN)
    return conn && conn->kind ? reconsider(c, owner, conn) : PL_R_INGRESS_NO_RECORD;
  set_flow(&f, netns_of(conn), &p->src, p->sport, &p->dst, p->dport);
  a = arriving.lookup(&f);
  if (a) {
    t->identity = a->origin.identity;
    t->workload = a->origin.workload;
    verdict = verdict_of(owner->workload, a->origin.identity, p->dport, IPPROTO_TCP, &t->rule);
    if (a->kind == PL_ARRIVAL_NATIVE)
      return verdict == PL_ALLOW ? PASS : PL_R_POLICY_DENIED;
    if (a->kind == PL_ARRIVAL_PROXY)
      return verdict != PL_DENY ? PASS : PL_R_POLICY_DENIED;
    if (a->kind == PL_ARRIVAL_LOCAL)
      return verdict == PL_ALLOW || a->origin.workload == owner->workload ? PASS : PL_R_POLICY_DENIED;
    return PL_R_INGRESS_NO_RECORD; /* captured connections end at the agent's listener, not here */
  }
  if (is_loopback(&p->src) || is_loopback(&p->dst))
    return PL_R_INGRESS_NO_RECORD;
  if (!(owner->flags & PL_MEMBER_PERMISSIVE))
    return PL_R_INGRESS_PLAINTEXT;
  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP, &t->rule) != PL_ALLOW)
    return PL_R_POLICY_DENIED;
  return p->flags & TCP_SYN ? PL_R_INGRESS_ALLOWED : PASS;
}

static inline u32 udp_in(struct pl_config *c, struct pl_member *owner, struct bpf_sock *sk, struct pl_conn *conn, const struct packet *p,
                         struct tale *t)
{
  struct pl_peers *ps = peers.sk_storage_get(sk, 0, 0);
  u32 generation = generation_of(c);
  struct pl_datagram *d;
  struct pl_flow f = {};
  struct pl_peer *peer;

  if (ps) {
    peer = peer_by_rewritten(ps, &p->src, p->sport);
    if (peer)
      return reconsider_peer(c, owner, peer, p->dport);
  }
  set_flow(&f, netns_of(conn), &p->src, p->sport, &p->dst, p->dport);
  d = datagrams.lookup(&f);
  if (!d && (is_loopback(&p->src) || is_loopback(&p->dst)))
    return PL_R_INGRESS_NO_RECORD;
  if (d) {
    t->identity = d->identity;
    t->workload = d->workload;
    if (!datagram_allowed(owner, d, p->dport))
      return PL_R_POLICY_DENIED;
  } else {
    if (!(owner->flags & PL_MEMBER_PERMISSIVE))
      return PL_R_INGRESS_PLAINTEXT;
    if (verdict_of(owner->workload, 0, p->dport, IPPROTO_UDP, &t->rule) != PL_ALLOW)
      return PL_R_POLICY_DENIED;
  }
  ps = peers.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!ps)
    return PL_R_MAP_FULL;
  ps->served = 1;
  if (d)
    return PASS;
  peer = next_peer(ps); /* so that it can be answered */
  drop_datagram(netns_of(conn), peer);
  peer->asked = p->src;
  peer->asked_port = p->sport;
  peer->to = p->src;
  peer->port = p->sport;
  peer->identity = owner->identity;
  peer->workload = 0;
  peer->generation = generation;
  peer->kind = PL_CONN_OUTSIDE;
  return PL_R_INGRESS_ALLOWED;
}

static inline int judge_in(struct __sk_buff *skb, struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn)
{
  u32 generation = generation_of(c), reason;
  struct pl_member *owner;
  struct packet p = {};
  struct tale t = {};

  owner = owner_member(c, skb);
  if (owner && owner->role != PL_ROLE_WORKLOAD)
    return trust(generation, sk, conn) == PASS;
  if (!parse(skb, &p)) {
    reason = PL_R_SOCKET_TYPE;
  } else if (!owner) {
    reason = PL_R_UNKNOWN_CGROUP;
  } else if (c->schema != PL_SCHEMA) {
    reason = PL_R_SCHEMA;
  } else {
    t.dst_workload = owner->workload;
    if (conn && sk->state == TCP_STATE_LISTEN)
      *(volatile u64 *)&conn->heard = (u64)owner->workload << 32 | generation;
    reason = p.proto == IPPROTO_TCP ? tcp_in(c, owner, sk, conn, &p, &t) : udp_in(c, owner, sk, conn, &p, &t);
  }
  if (reason == PASS)
    return 1;
  describe(&t, &p);
  t.hook = PL_HOOK_INGRESS;
  tell(reason, &t);
  return reason <= PL_R_ALLOWED_MAX;
}

int on_ingress(struct __sk_buff *skb)
{
  struct pl_config *c = configuration();
  struct bpf_sock *sk = skb->sk;
  struct pl_conn *conn;

  if (!c || !sk) /* never less than a full socket: those have no cgroup to run us */
    return 0;
  conn = conns.sk_storage_get(sk, 0, 0);
  return admitted(c, sk, conn) || agreed(c, sk, conn, skb) ? 1 : judge_in(skb, c, sk, conn);
}
