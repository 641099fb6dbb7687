/* Every layout that crosses a map, once. Python takes them from BCC through the loader's layouts.json.
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that both families share code and
 * keys. Ports are in host order (u16). Identities, workload and service ids come from the controller. */

#define PL_SCHEMA 2 /* bumped when any layout or map here changes; the agent refuses pins of another */

#define PL_LEVEL 0x50494c /* private socket option level, "PIL" */
#define PL_OPT_ORIGIN 1   /* getsockopt on an accepted socket: struct pl_origin */
#define PL_OPT_CALLER 2   /* setsockopt on the proxy's client socket: struct pl_caller */

#define PL_PORT_OUTBOUND 15001
#define PL_PORT_HBONE 15008
#define PL_PORT_DNS 15053

struct pl_addr { u32 w[4]; };

/* config: ARRAY[1] */
struct pl_config {
  u32 schema;
  u32 generation;     /* connections of another generation are re-evaluated */
  u32 level_lo, level_hi; /* ancestor levels at which a cgroup may be a workload's (cgroup2 depth) */
  u64 host_netns;     /* cookie of the node's own netns */
  u64 lease_until_ns; /* CLOCK_BOOTTIME; past it new connections are denied; 0: no limit */
  u32 outbound_allow; /* 1: destinations outside the mesh pass */
  u32 connects_max;   /* connections of one identity under way at once; 0: PL_CONNECTS_MAX */
};

/* members: HASH u64 cgroup id -> who its processes are. Written by the agent alone. */
enum pl_role { PL_ROLE_NONE, PL_ROLE_WORKLOAD, PL_ROLE_AGENT, PL_ROLE_PROXY };
#define PL_MEMBER_PERMISSIVE 1u /* plaintext from outside may enter, as identity unknown */
#define PL_MEMBER_NO_EXPRESS 2u
struct pl_member { u32 role, flags, workload, identity; u64 netns; };

/* dests: HASH. What connect() to this address means. Port 0 entry of a workload's address: undeclared, deny. */
struct pl_dest_key { struct pl_addr addr; u16 port; u8 proto; u8 pad; };
enum pl_dest_kind { PL_DEST_NATIVE = 1, PL_DEST_PROXY = 2, PL_DEST_DENY = 3 };
struct pl_dest { u32 kind, service, backends, reason; };

/* backends: HASH; slots 0..backends-1. For NATIVE these live on this node. */
struct pl_backend_key { u32 service; u16 port; u16 slot; };
struct pl_backend { struct pl_addr addr; u32 workload; u16 port; u16 pad; };

/* policy: HASH. L4 verdict, decided by mesh.policy for each (destination workload, port, source identity);
 * no entry is a denial. PL_L7: only the proxy can tell. */
struct pl_policy_key { u32 workload, identity; u16 port; u8 proto; u8 pad; };
enum pl_verdict { PL_DENY = 0, PL_ALLOW = 1, PL_L7 = 2 };
struct pl_policy { u32 verdict, rule; };

/* listeners: HASH u64 netns cookie -> u32 1: the agent owns 15001/15053 in there */
/* dials: HASH; where the proxy's sockets may connect to */
struct pl_dial_key { u64 netns; struct pl_addr addr; u16 port; u16 pad; u32 pad2; };

/* egress: LPM_TRIE; destinations outside the mesh. prefixlen counts from the address's first bit */
struct pl_egress_key { u32 prefixlen; struct pl_addr addr; };
#define PL_EGRESS_PORTS 8
struct pl_egress { u32 allow; u32 nports; u16 ports[PL_EGRESS_PORTS]; }; /* nports 0: every port */

/* origins: SK_STORAGE on captured client sockets and on the sockets accepted from them */
struct pl_origin {
  struct pl_addr dst;    /* as the application asked */
  struct pl_addr client; /* the application's own address */
  u64 cgroup, netns;
  u32 workload, identity, service;
  u16 dst_port, client_port;
};

/* callers: SK_STORAGE on the proxy's client socket: what accept() and getpeername() shall show */
struct pl_caller { struct pl_addr addr; u32 identity; u16 port; u16 pad; };

/* arriving: HASH; from TCP_CONNECT_CB to PASSIVE_ESTABLISHED. netns is set for loopback tuples only,
 * which repeat across namespaces; source first, as the SYN carries them. */
struct pl_flow { u64 netns; struct pl_addr src, dst; u16 sport, dport; u32 pad; };
enum pl_arrival_kind {
  PL_ARRIVAL_CAPTURED = 1, PL_ARRIVAL_NATIVE = 2, PL_ARRIVAL_PROXY = 3,
  PL_ARRIVAL_LOCAL = 4,   /* loopback inside a workload's own netns */
  PL_CONN_OUTBOUND = 5,   /* to a destination outside the mesh; leaves no arrival */
  PL_CONN_OUTSIDE = 6,    /* accepted without a record: permissive, or the agent's own listener */
  PL_CONN_TRUSTED = 7,    /* a socket of the agent's, looked up once for each generation */
  PL_CONN_DNS = 8         /* datagrams to the mesh's resolver */
};
struct pl_arrival { u32 kind, pad; struct pl_origin origin; };

/* usage: HASH u32 identity -> its entries in `arriving`, so that nobody fills that for the others; and what it was told
 * in the present window of `tolds`, over all CPUs. Identities are never reused; entries are few. */
#define PL_CONNECTS_MAX 2048
struct pl_usage { u32 arriving, told; u64 window; };

/* conns: SK_STORAGE on both ends of admitted connections: what a new generation re-evaluates */
struct pl_conn {
  u32 generation, workload, identity; /* destination workload, source identity */
  u16 port; u8 proto, kind;           /* pl_arrival_kind */
  struct pl_addr peer; u16 peer_port; u16 flags; /* peer: what the application sees */
  u32 source;                         /* source workload */
};
#define PL_CONN_UNRECORDED 1 /* `arriving` was full: its SYN is held back */
#define PL_CONN_SERVER 2     /* the accepted end; workload is then the source's as well */


/* events: RINGBUF, for `pillion flows` */
struct pl_event {
  u64 time_ns;
  struct pl_addr src, dst;
  u32 verdict, reason, src_identity, src_workload, dst_workload, rule;
  u16 sport, dport; u8 proto, hook; u16 pad;
};

/* tolds: PERCPU_ARRAY[1]; how many events this CPU told in the present window */
struct pl_told { u64 window; u32 allowed, denied; };

/* counters: PERCPU_ARRAY u64 by reason. Names are the enum's, lower case, without PL_R_. */
enum pl_reason {
  PL_R_NATIVE_ALLOWED, PL_R_CAPTURED, PL_R_OUTBOUND_ALLOWED, PL_R_INGRESS_ALLOWED, PL_R_PROXY_DIAL,
  PL_R_UNKNOWN_CGROUP, PL_R_POLICY_DENIED, PL_R_OUTBOUND_DENIED, PL_R_NO_BACKEND, PL_R_MAP_MISS,
  PL_R_MAP_FULL, PL_R_RESERVED_PORT, PL_R_FOREIGN_SOCKET, PL_R_SOCKET_TYPE, PL_R_BIND_DENIED,
  PL_R_NO_LISTENER, PL_R_INGRESS_PLAINTEXT, PL_R_INGRESS_NO_RECORD, PL_R_EGRESS_PROTOCOL,
  PL_R_EGRESS_NO_CONNECT, PL_R_DIAL_DENIED, PL_R_NO_CALLER, PL_R_UDP_REMOTE, PL_R_LEASE_EXPIRED,
  PL_R_GENERATION_DENIED, PL_R_PORT_UNDECLARED, PL_R_SPOOFED, PL_R_SCHEMA,
  PL_R_EVENTS_SAMPLED, PL_R_EVENTS_LOST, PL_R_SOCKET_OPTION, PL_R_BUDGET_CONNECTS,
  PL_R_COUNT
};
#define PL_R_ALLOWED_MAX PL_R_PROXY_DIAL /* up to here the reason is an admission */
#define PL_COUNTERS 64                   /* room, so that a new reason is no new schema */

enum pl_hook {
  PL_HOOK_CREATE = 1, PL_HOOK_CONNECT, PL_HOOK_BIND, PL_HOOK_SENDMSG, PL_HOOK_SOCKOPS, PL_HOOK_INGRESS,
  PL_HOOK_EGRESS, PL_HOOK_SOCKOPT
};

/* creators: SK_STORAGE on every inet socket made under the hooks. cgroup: the member that made it */
struct pl_creator { u64 cgroup, netns; };

/* sources: HASH u32 workload id -> the addresses a server shall see; without an entry, the socket's own */
struct pl_source { struct pl_addr v4, v6; };

/* peers: SK_STORAGE on a workload's UDP sockets: whom it sent to, as asked and as rewritten. The oldest
 * gives way; its record in `datagrams` goes with it, as all do when the socket is closed. */
#define PL_PEERS 16
struct pl_peer {
  struct pl_addr asked, to, src;        /* src: of the record in `datagrams` */
  u32 generation, workload, identity;   /* destination workload, own identity */
  u16 asked_port, port, sport;
  u8 kind, recorded;                    /* pl_arrival_kind */
};
struct pl_peers { u32 next, served; struct pl_peer at[PL_PEERS]; }; /* served: has taken datagrams from others */

/* datagrams: HASH pl_flow (client to server) -> who sends. What admits a datagram at its receiver, and the answer. */
struct pl_datagram { u32 workload, identity, kind, pad; };

/* veths: HASH; see veth.c. flags: PL_MEMBER_PERMISSIVE */
struct pl_veth_key { u32 ifindex; struct pl_addr addr; };
struct pl_veth { u64 netns; u32 flags, pad; };

/* Only so that the compiler describes what no map's key or leaf names */
struct pl_shapes { struct pl_event event; };

_Static_assert(sizeof(struct pl_config) == 40, "pl_config");
_Static_assert(sizeof(struct pl_member) == 24, "pl_member");
_Static_assert(sizeof(struct pl_dest_key) == 20 && sizeof(struct pl_dest) == 16, "pl_dest");
_Static_assert(sizeof(struct pl_backend_key) == 8 && sizeof(struct pl_backend) == 24, "pl_backend");
_Static_assert(sizeof(struct pl_policy_key) == 12 && sizeof(struct pl_policy) == 8, "pl_policy");
_Static_assert(sizeof(struct pl_dial_key) == 32, "pl_dial_key");
_Static_assert(sizeof(struct pl_egress_key) == 20 && sizeof(struct pl_egress) == 24, "pl_egress");
_Static_assert(sizeof(struct pl_origin) == 64 && sizeof(struct pl_caller) == 24, "pl_origin, pl_caller");
_Static_assert(sizeof(struct pl_flow) == 48 && sizeof(struct pl_arrival) == 72, "pl_flow, pl_arrival");
_Static_assert(sizeof(struct pl_usage) == 16, "pl_usage");
_Static_assert(sizeof(struct pl_conn) == 40, "pl_conn");
_Static_assert(sizeof(struct pl_event) == 72, "pl_event");
_Static_assert(sizeof(struct pl_peer) == 68 && sizeof(struct pl_peers) == 8 + PL_PEERS * 68, "pl_peer");
_Static_assert(PL_R_COUNT <= PL_COUNTERS, "counters");
