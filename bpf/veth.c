/* The host side of a workload's veth (clsact ingress: what the workload sends, by whatever socket, AF_PACKET too).
 * cgroup hooks judge sockets; this judges packets: the workload's own addresses, known protocols, and out of the node
 * only tunnels (as `dials` says), their replies, and what egress policy allows. Unknown is dropped. It writes no map. */

#define TC_OK 0
#define TC_DROP 2

#define ETH_BYTES 14
#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_IPV6 0x86dd
#define PROTO_FRAGMENT 44
#define PROTO_ICMPV6 58
#define ND_SOLICIT_ROUTER 133
#define ND_SOLICIT 135
#define ND_ADVERT 136
#define TCP_ACK_OR_RST 0x14

/* veths: HASH. Own addresses of the workload behind a host-side interface; ifindex 0: an address of any on this node */
PL_MAP("hash", veths, struct pl_veth_key, struct pl_veth, 32768, PL_SPARSE);
PL_MAP("array", ways, u32, struct pl_way, PL_WAYS, 0);

static inline int drop(u32 reason)
{
  count(reason);
  return TC_DROP;
}

/* To a workload of this node: what opens a connection, and each datagram, has the record that its sender's hooks wrote.
 * Else one packet by hand would reach a namespace that policy closes (its sockets: ingress.c). */
static inline int to_neighbour(struct __sk_buff *skb, const struct pl_addr *src, const struct pl_addr *dst, u8 proto, int l4)
{
  struct pl_flow f = {};
  u16 ports[2] = {};
  u8 flags = 0;
  if (bpf_skb_load_bytes(skb, l4, ports, 4) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  set_flow(&f, 0, src, ntoh16(ports[0]), dst, ntoh16(ports[1]));
  if (proto == IPPROTO_UDP) {
    struct pl_flow back = {};
    set_flow(&back, 0, dst, ntoh16(ports[1]), src, ntoh16(ports[0]));
    return datagrams.lookup(&f) || datagrams.lookup(&back) ? TC_OK : drop(PL_R_EGRESS_NO_CONNECT);
  }
  if (bpf_skb_load_bytes(skb, l4 + 13, &flags, 1) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  return flags & TCP_ACK_OR_RST || arriving.lookup(&f) ? TC_OK : drop(PL_R_EGRESS_NO_CONNECT);
}

/* As Ways in nodeagent/tc.py has it */
static inline u32 way_of(const struct pl_veth_key *k)
{
  return ((k->addr.w[0] ^ k->addr.w[1] ^ k->addr.w[2] ^ k->addr.w[3] ^ k->ifindex) * 0x9e3779b1u) >> 20;
}

static inline bool guarded(struct pl_veth_key *k)
{
  u32 at = way_of(k);
  struct pl_way *way = ways.lookup(&at);

  if (way && way->taken && way->key.ifindex == k->ifindex && same_addr(&way->key.addr, &k->addr))
    return true;
  return veths.lookup(k) != NULL;
}

/* Most packets: a whole segment to a workload of this node that opens nothing. False: ask the rest of this file. */
static inline bool carries_on4(struct __sk_buff *skb)
{
  u8 *h = (u8 *)(long)skb->data + ETH_BYTES, *end = (void *)(long)skb->data_end;
  struct pl_veth_key own = {}, local = {};

  if (h + 34 > end)
    return false;
  if ((h[0] & 15) != 5 || h[9] != IPPROTO_TCP || (h[6] & 0x1f) || h[7] || !(h[33] & TCP_ACK_OR_RST))
    return false;
  own.ifindex = skb->ifindex;
  set_v4(&own.addr, *(u32 *)(h + 12));
  set_v4(&local.addr, *(u32 *)(h + 16));
  return guarded(&own) && guarded(&local);
}

static inline bool carries_on6(struct __sk_buff *skb)
{
  u8 *h = (u8 *)(long)skb->data + ETH_BYTES, *end = (void *)(long)skb->data_end;
  struct pl_veth_key own = {}, local = {};

  if (h + 54 > end)
    return false;
  if (h[6] != IPPROTO_TCP || !(h[53] & TCP_ACK_OR_RST))
    return false;
  own.ifindex = skb->ifindex;
  own.addr = *(struct pl_addr *)(h + 8);
  local.addr = *(struct pl_addr *)(h + 24);
  return guarded(&own) && guarded(&local);
}

/* l4: where the transport header starts; fragment: it does not start in this packet */
static inline int transport(struct __sk_buff *skb, struct pl_veth *v, struct pl_addr *src, struct pl_addr *dst, u8 proto, int l4,
                            int fragment)
{
  struct pl_veth_key local = {};
  local.addr = *dst;
  if (veths.lookup(&local)) { /* of a datagram in pieces, the first piece is asked for its record; TCP comes in none */
    if (fragment)
      return proto == IPPROTO_UDP ? TC_OK : drop(PL_R_EGRESS_PROTOCOL);
    return to_neighbour(skb, src, dst, proto, l4);
  }
  if (fragment)
    return drop(PL_R_EGRESS_PROTOCOL);
  u16 ports[2] = {};
  if (bpf_skb_load_bytes(skb, l4, ports, 4) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  u16 sport = ntoh16(ports[0]), dport = ntoh16(ports[1]);
  struct pl_dial_key dial = {};
  dial.netns = v->netns;
  dial.addr = *dst;
  dial.port = dport;
  if ((proto == IPPROTO_TCP || dport != PL_PORT_HBONE) && dials.lookup(&dial))
    return TC_OK;
  struct pl_dest_key peer = {};
  peer.addr = *dst;
  peer.proto = IPPROTO_TCP;
  struct pl_dest *mesh = dests.lookup(&peer);
  bool reply = proto != IPPROTO_TCP; /* opens nothing at the peer; of datagrams the sockets' hooks know */
  if (proto == IPPROTO_TCP) {
    u8 flags = 0;
    if (bpf_skb_load_bytes(skb, l4 + 13, &flags, 1) < 0)
      return drop(PL_R_EGRESS_PROTOCOL);
    reply = flags & TCP_ACK_OR_RST;
    if (reply && mesh && sport == PL_PORT_HBONE)
      return TC_OK;
    if (reply && (v->flags & PL_MEMBER_PERMISSIVE))
      return TC_OK;
  }
  struct pl_config *c = configuration();
  if (!mesh && c && outbound_allowed(c, dst, dport)) /* the mesh's own addresses only by tunnel */
    return TC_OK;
  u32 rule, way = mesh ? PL_R_OUTBOUND_DENIED : granted(v->netns, 0, dst, dport, proto, &rule);
  if (way == PL_R_OUTBOUND_ALLOWED || (way == PL_R_GRANT_EXPIRED && reply))
    return TC_OK;
  return drop(way);
}

static inline int ipv4(struct __sk_buff *skb)
{
  u8 h[20] = {};
  if (bpf_skb_load_bytes(skb, ETH_BYTES, h, 20) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  struct pl_veth_key own = {};
  own.ifindex = skb->ifindex;
  set_v4(&own.addr, *(u32 *)(h + 12));
  struct pl_veth *v = veths.lookup(&own);
  if (!v)
    return drop(PL_R_SPOOFED);
  if ((h[0] & 15) < 5 || (h[9] != IPPROTO_TCP && h[9] != IPPROTO_UDP))
    return drop(PL_R_EGRESS_PROTOCOL);
  struct pl_addr dst = {};
  set_v4(&dst, *(u32 *)(h + 16));
  int offset = (h[6] & 0x1f) << 8 | h[7];
  return transport(skb, v, &own.addr, &dst, h[9], ETH_BYTES + (h[0] & 15) * 4, offset != 0);
}

static inline bool link_local(u32 *a)
{
  return (a[0] & hton32(0xffc00000)) == hton32(0xfe800000);
}

/* Neighbour discovery of its own addresses and nothing else of ICMPv6 */
static inline int neighbour(struct __sk_buff *skb, struct pl_veth *v, u32 *src, u8 hops)
{
  u8 type = 0;
  if (hops != 255 || bpf_skb_load_bytes(skb, ETH_BYTES + 40, &type, 1) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  int unspecified = (src[0] | src[1] | src[2] | src[3]) == 0;
  if (!v && !unspecified && !link_local(src))
    return drop(PL_R_SPOOFED);
  if (type == ND_SOLICIT || type == ND_SOLICIT_ROUTER)
    return TC_OK;
  if (type != ND_ADVERT)
    return drop(PL_R_EGRESS_PROTOCOL);
  struct pl_veth_key target = {};
  target.ifindex = skb->ifindex;
  if (bpf_skb_load_bytes(skb, ETH_BYTES + 48, &target.addr, 16) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  if (link_local(target.addr.w) || veths.lookup(&target))
    return TC_OK;
  return drop(PL_R_SPOOFED);
}

static inline int ipv6(struct __sk_buff *skb)
{
  u32 h[10] = {};
  if (bpf_skb_load_bytes(skb, ETH_BYTES, h, 40) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  u8 proto = ((u8 *)h)[6], hops = ((u8 *)h)[7];
  struct pl_veth_key own = {};
  own.ifindex = skb->ifindex;
  own.addr.w[0] = h[2];
  own.addr.w[1] = h[3];
  own.addr.w[2] = h[4];
  own.addr.w[3] = h[5];
  struct pl_veth *v = veths.lookup(&own);
  if (proto == PROTO_ICMPV6)
    return neighbour(skb, v, &h[2], hops);
  if (proto != IPPROTO_TCP && proto != IPPROTO_UDP && proto != PROTO_FRAGMENT)
    return drop(PL_R_EGRESS_PROTOCOL);
  if (!v)
    return drop(PL_R_SPOOFED);
  struct pl_addr dst = {};
  dst.w[0] = h[6];
  dst.w[1] = h[7];
  dst.w[2] = h[8];
  dst.w[3] = h[9];
  if (proto != PROTO_FRAGMENT)
    return transport(skb, v, &own.addr, &dst, proto, ETH_BYTES + 40, 0);
  u8 part[4] = {};
  if (bpf_skb_load_bytes(skb, ETH_BYTES + 40, part, 4) < 0 || part[0] != IPPROTO_UDP)
    return drop(PL_R_EGRESS_PROTOCOL);
  int offset = part[2] << 8 | (part[3] & 0xf8);
  return transport(skb, v, &own.addr, &dst, IPPROTO_UDP, ETH_BYTES + 48, offset != 0);
}

static inline int arp(struct __sk_buff *skb)
{
  u32 sender = 0;
  struct pl_veth_key own = {};
  if (bpf_skb_load_bytes(skb, ETH_BYTES + 14, &sender, 4) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  if (!sender) /* a probe for a duplicate: claims nothing */
    return TC_OK;
  own.ifindex = skb->ifindex;
  set_v4(&own.addr, sender);
  return veths.lookup(&own) ? TC_OK : drop(PL_R_SPOOFED);
}

int veth(struct __sk_buff *skb)
{
  u16 type = 0;
  if (bpf_skb_load_bytes(skb, 12, &type, 2) < 0)
    return drop(PL_R_EGRESS_PROTOCOL);
  if (type == ntoh16(ETH_P_IP))
    return carries_on4(skb) ? TC_OK : ipv4(skb);
  if (type == ntoh16(ETH_P_IPV6))
    return carries_on6(skb) ? TC_OK : ipv6(skb);
  if (type == ntoh16(ETH_P_ARP))
    return arp(skb);
  return drop(PL_R_EGRESS_PROTOCOL);
}
