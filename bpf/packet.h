/* What ingress.c and egress.c share: the packet, and whether its connection may go on. */

#define IPPROTO_ICMPV6 58
#define TCP_SYN 0x02
#define TCP_ACK 0x10
#define PASS PL_R_COUNT /* an admission nobody is told of */

struct packet {
  struct pl_addr src, dst;
  u16 sport, dport;
  u8 proto, flags;
};

struct head4 { u8 version, tos; u16 length, id, fragment; u8 ttl, proto; u16 sum; u32 src, dst; };
struct head6 { u32 version; u16 length; u8 next, hops; struct pl_addr src, dst; };
struct head_tcp { u16 sport, dport; u32 seq, ack; u8 offset, flags; };

/* False: neither TCP nor UDP, or not to be read. IPv6 extension headers count as that. */
static inline bool parse(struct __sk_buff *skb, struct packet *p)
{
  struct head_tcp tcp;
  struct head4 v4;
  struct head6 v6;
  u32 at;

  if (bpf_skb_load_bytes(skb, 0, &v4, sizeof(v4)))
    return false;
  if (v4.version >> 4 == 4) {
    set_v4(&p->src, v4.src);
    set_v4(&p->dst, v4.dst);
    p->proto = v4.proto;
    at = (v4.version & 15) * 4;
    if (ntoh16(v4.fragment) & 0x1fff)
      return false;
  } else {
    if (bpf_skb_load_bytes(skb, 0, &v6, sizeof(v6)))
      return false;
    p->src = v6.src;
    p->dst = v6.dst;
    p->proto = v6.next;
    at = sizeof(v6);
  }
  if (p->proto == IPPROTO_TCP) {
    if (bpf_skb_load_bytes(skb, at, &tcp, 14))
      return false;
    p->flags = tcp.flags;
  } else if (p->proto == IPPROTO_UDP) {
    if (bpf_skb_load_bytes(skb, at, &tcp, 4))
      return false;
    p->flags = 0;
  } else {
    return false;
  }
  p->sport = ntoh16(tcp.sport);
  p->dport = ntoh16(tcp.dport);
  return true;
}

static inline bool admitted(struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn)
{
  return conn && conn->generation && conn->generation == c->generation &&
         (conn->kind == PL_CONN_TRUSTED || sk->state != TCP_STATE_LISTEN);
}

/* A listener's owner was looked up under this generation: who, as in pl_arrival's `agreed`, or 0 */
static inline u64 heard(struct pl_config *c, struct bpf_sock *sk, struct pl_conn *conn)
{
  u64 owner;

  if (!conn || sk->state != TCP_STATE_LISTEN)
    return 0;
  owner = *(volatile u64 *)&conn->heard;
  return (u32)owner && (u32)owner == generation_of(c) ? owner : 0;
}

/* A socket of the agent's: looked up once for each generation. PASS, or why not. */
static inline u32 trust(u32 generation, struct bpf_sock *sk, struct pl_conn *conn)
{
  struct pl_conn trusted = {};

  if (conn && (conn->flags & PL_CONN_UNRECORDED))
    return PL_R_MAP_FULL;
  if (!conn) {
    trusted.kind = PL_CONN_TRUSTED;
    conn = conns.sk_storage_get(sk, &trusted, BPF_SK_STORAGE_GET_F_CREATE);
  }
  if (conn) {
    if (!conn->kind)
      conn->kind = PL_CONN_TRUSTED;
    conn->generation = generation;
  }
  return PASS;
}

/* May a workload's connection go on under the policy of now? PASS, or why not. */
static inline u32 reconsider(struct pl_config *c, struct pl_member *owner, struct pl_conn *conn)
{
  u32 generation = generation_of(c);
  bool server = conn->flags & PL_CONN_SERVER, may = false;
  u32 rule, verdict;

  if (conn->flags & PL_CONN_UNRECORDED)
    return PL_R_MAP_FULL;
  if (!server && conn->identity != owner->identity)
    return PL_R_FOREIGN_SOCKET;
  if (conn->kind == PL_CONN_OUTBOUND) {
    may = goes_on(c, owner->workload, &conn->peer, conn->peer_port, IPPROTO_TCP);
  } else if (!server && (conn->kind == PL_ARRIVAL_CAPTURED || conn->kind == PL_ARRIVAL_LOCAL)) {
    may = true; /* the proxy reconsiders what it holds */
  } else {
    verdict = verdict_of(server ? owner->workload : conn->workload, conn->identity, conn->port, IPPROTO_TCP, &rule);
    if (conn->kind == PL_ARRIVAL_NATIVE)
      may = verdict == PL_ALLOW;
    else if (conn->kind == PL_ARRIVAL_PROXY)
      may = server && verdict != PL_DENY;
    else if (conn->kind == PL_ARRIVAL_LOCAL)
      may = verdict == PL_ALLOW || conn->workload == owner->workload;
    else if (conn->kind == PL_CONN_OUTSIDE)
      may = verdict == PL_ALLOW && (owner->flags & PL_MEMBER_PERMISSIVE);
  }
  if (!may)
    return conn->generation ? PL_R_GENERATION_DENIED : conn->kind == PL_CONN_OUTSIDE ? PL_R_INGRESS_PLAINTEXT : PL_R_POLICY_DENIED;
  conn->generation = generation;
  return PASS;
}

/* The same for whom a UDP socket talks to */
static inline u32 reconsider_peer(struct pl_config *c, struct pl_member *owner, struct pl_peer *p, u16 own_port)
{
  u32 generation = generation_of(c);
  bool may = true;
  u32 rule;

  if (p->identity != owner->identity)
    return PL_R_FOREIGN_SOCKET;
  if (p->generation == generation)
    return PASS;
  if (p->kind == PL_ARRIVAL_NATIVE)
    may = verdict_of(p->workload, owner->identity, p->port, IPPROTO_UDP, &rule) == PL_ALLOW;
  else if (p->kind == PL_CONN_OUTBOUND)
    may = goes_on(c, owner->workload, &p->asked, p->asked_port, IPPROTO_UDP);
  else if (p->kind == PL_CONN_OUTSIDE)
    may = (owner->flags & PL_MEMBER_PERMISSIVE) && verdict_of(owner->workload, 0, own_port, IPPROTO_UDP, &rule) == PL_ALLOW;
  if (!may)
    return PL_R_GENERATION_DENIED;
  p->generation = generation;
  return PASS;
}

static inline bool datagram_allowed(struct pl_member *owner, struct pl_datagram *d, u16 port)
{
  u32 rule;

  if (d->kind == PL_ARRIVAL_LOCAL && d->workload == owner->workload)
    return true;
  return verdict_of(owner->workload, d->identity, port, IPPROTO_UDP, &rule) == PL_ALLOW;
}

static inline u64 netns_of(struct pl_conn *conn)
{
  return conn ? conn->netns : 0;
}

static inline void describe(struct tale *t, const struct packet *p)
{
  t->src = p->src;
  t->dst = p->dst;
  t->sport = p->sport;
  t->dport = p->dport;
  t->proto = p->proto;
}
