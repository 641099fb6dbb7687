/* What leaves a workload's sockets: TCP that went through connect() or accept(), UDP that went through sendmsg() or
 * connect(), and answers. Raw, ping, UDP-Lite and SCTP never pass. */

static inline u32 tcp_out(struct pl_config *c, struct pl_member *owner, struct bpf_sock *sk, struct pl_conn *conn, const struct packet *p)
{
  if (sk->state == TCP_STATE_LISTEN) /* answers a SYN that ingress.c let in */
    return (p->flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK) ? PASS : PL_R_EGRESS_NO_CONNECT;
  return conn && conn->kind ? reconsider(c, owner, conn) : PL_R_EGRESS_NO_CONNECT;
}

static inline u32 udp_out(struct pl_config *c, struct pl_member *owner, struct bpf_sock *sk, struct pl_conn *conn, const struct packet *p)
{
  struct pl_peers *ps = peers.sk_storage_get(sk, 0, 0);
  struct pl_datagram sent = {}, *d;
  struct pl_flow f = {};
  struct pl_peer *peer;
  u64 netns = netns_of(conn);
  u32 reason;

  if (!ps)
    return PL_R_EGRESS_NO_CONNECT;
  peer = peer_by_rewritten(ps, &p->dst, p->dport);
  if (peer) {
    reason = reconsider_peer(c, owner, peer, p->sport);
    if (reason != PASS || (peer->kind != PL_ARRIVAL_NATIVE && peer->kind != PL_ARRIVAL_LOCAL))
      return reason;
    set_flow(&f, netns, &p->src, p->sport, &p->dst, p->dport);
    if (peer->recorded && peer->sport == p->sport && same_addr(&peer->src, &p->src)) {
      d = datagrams.lookup(&f); /* another socket of the same port may have taken it along */
      if (d && d->workload == owner->workload)
        return PASS;
    } else {
      drop_datagram(netns, peer);
    }
    sent.workload = owner->workload;
    sent.identity = owner->identity;
    sent.kind = peer->kind;
    if (datagrams.update(&f, &sent))
      return PL_R_MAP_FULL;
    peer->src = p->src;
    peer->sport = p->sport;
    peer->recorded = 1;
    return PASS;
  }
  set_flow(&f, netns, &p->dst, p->dport, &p->src, p->sport); /* an answer to a client of this kernel */
  d = datagrams.lookup(&f);
  if (!d)
    return PL_R_EGRESS_NO_CONNECT;
  return datagram_allowed(owner, d, p->sport) ? PASS : PL_R_POLICY_DENIED;
}

/* A workload's listener answers a SYN: all it may send */
static inline bool answers(struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn, struct __sk_buff *skb)
{
  struct packet p = {};

  return heard(c, sk, conn) && parse(skb, &p) && p.proto == IPPROTO_TCP && (p.flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK);
}

static inline int judge_out(struct __sk_buff *skb, struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn)
{
  struct pl_member *owner;
  struct packet p = {};
  struct tale t = {};
  u32 reason;

  owner = owner_member(c, skb);
  if (owner && owner->role != PL_ROLE_WORKLOAD) {
    reason = trust(generation_of(c), sk, conn);
    if (reason == PASS)
      return 1;
    parse(skb, &p);
  } else if (!parse(skb, &p)) {
    reason = PL_R_EGRESS_PROTOCOL;
  } else if (!owner) {
    reason = PL_R_UNKNOWN_CGROUP;
  } else if (c->schema != PL_SCHEMA) {
    reason = PL_R_SCHEMA;
  } else {
    reason = p.proto == IPPROTO_TCP ? tcp_out(c, owner, sk, conn, &p) : udp_out(c, owner, sk, conn, &p);
  }
  if (reason == PASS)
    return 1;
  if (owner) {
    t.identity = owner->identity;
    t.workload = owner->workload;
  }
  describe(&t, &p);
  t.hook = PL_HOOK_EGRESS;
  tell(reason, &t);
  return 0;
}

int on_egress(struct __sk_buff *skb)
{
  struct pl_config *c = configuration();
  struct bpf_sock *sk = skb->sk;
  struct pl_conn *conn;

  if (!c || !sk) /* never less than a full socket: those have no cgroup to run us */
    return 0;
  conn = conns.sk_storage_get(sk, 0, 0);
  return admitted(c, sk, conn) || answers(c, sk, conn, skb) ? 1 : judge_out(skb, c, sk, conn);
}
