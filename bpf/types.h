/* Every layout that crosses a map, once. Python takes them from BCC through the loader's layouts.json.
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that both families share code and
 * keys. Ports are in host order (u16). Identities, workload and service ids come from the controller. */

#define PL_SCHEMA 9 /* bumped when any layout or map here changes; the agent refuses pins of another */

#define PL_LEVEL 0x50494c /* private socket option level, "PIL" */
#define PL_OPT_ORIGIN 1   /* getsockopt on an accepted socket: struct pl_origin */
#define PL_OPT_CALLER 2   /* setsockopt on the proxy's client socket: struct pl_caller */
#define PL_OPT_EXPRESS 3  /* on an accepted socket that is paired: get struct pl_xview, set struct pl_xarm */
#define PL_OPT_EXPRESS_HEAD 4 /* there: get the saved head, PL_X_HEAD_BYTES of it */

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

/* listeners: HASH u64 netns cookie -> u32 1: the agent owns 15001/15053 in there. Deleted when a listener on 15001 closes: the
 * next one there may be a stranger's. */
/* dials: HASH; where the proxy's sockets may connect to */
struct pl_dial_key { u64 netns; struct pl_addr addr; u16 port; u16 pad; u32 pad2; };

/* egress: LPM_TRIE; destinations outside the mesh. prefixlen counts from the address's first bit */
struct pl_egress_key { u32 prefixlen; struct pl_addr addr; };
#define PL_EGRESS_PORTS 8
struct pl_egress { u32 allow; u32 nports; u16 ports[PL_EGRESS_PORTS]; }; /* nports 0: every port */

/* grants: HASH; addresses outside the mesh that a name was answered with, each twice: for the workload that asked (netns 0),
 * and for the filter of its cable (workload 0). Past until_ns nothing new is let out; the entry stays while a connection needs it. */
struct pl_grant_key { u64 netns; struct pl_addr addr; u32 workload; u16 port; u8 proto; u8 pad; };
struct pl_grant { u64 until_ns; u32 rule, pad; }; /* CLOCK_BOOTTIME */

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
/* agreed: destination workload << 32 | generation under which connect() found a native connection allowed, or 0 */
struct pl_arrival { u32 kind, pad; u64 agreed; struct pl_origin origin; };

/* usage: HASH u32 identity -> its entries in `arriving`, so that nobody fills that for the others; and what it was told
 * in the present window of `tolds`, over all CPUs. Identities are never reused; entries are few. */
#define PL_CONNECTS_MAX 2048
struct pl_usage { u32 arriving, told; u64 window; };

/* conns: SK_STORAGE on every inet socket made under the hooks, and on accepted ones. Who made it; with a kind, as what it
 * was admitted: what a new generation re-evaluates. One storage for both, since each costs two allocations. */
struct pl_conn {
  u64 cgroup, netns;                  /* the member that made it, and where; 0: accepted, or older than the hooks */
  u64 heard;                          /* of a listener: its owner's workload << 32 | generation, as in pl_arrival */
  u32 generation, workload, identity; /* destination workload, source identity */
  u16 port; u8 proto, kind;           /* pl_arrival_kind */
  struct pl_addr peer; u16 peer_port; u16 flags; /* peer: what the application sees */
  u32 source;                         /* source workload */
};
#define PL_CONN_UNRECORDED 1 /* `arriving` was full: its SYN is held back */
#define PL_CONN_SERVER 2     /* the accepted end; workload is then the source's as well */
#define PL_CONN_LISTENER 4   /* the agent's: where captured connections come to */


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
  PL_R_EVENTS_SAMPLED, PL_R_EVENTS_LOST, PL_R_SOCKET_OPTION, PL_R_BUDGET_CONNECTS, PL_R_GRANT_EXPIRED,
  PL_R_COUNT
};
#define PL_R_ALLOWED_MAX PL_R_PROXY_DIAL /* up to here the reason is an admission */
#define PL_COUNTERS 64                   /* room, so that a new reason is no new schema */

enum pl_hook {
  PL_HOOK_CREATE = 1, PL_HOOK_CONNECT, PL_HOOK_BIND, PL_HOOK_SENDMSG, PL_HOOK_SOCKOPS, PL_HOOK_INGRESS,
  PL_HOOK_EGRESS, PL_HOOK_SOCKOPT
};

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

/* ways: ARRAY[PL_WAYS]. The keys of `veths` again, each in the place that way_of() gives it, if no other was first: asked
 * before `veths` is, which alone is complete. taken 0: an empty place */
#define PL_WAYS 4096
struct pl_way { struct pl_veth_key key; u32 taken; };

/* ---- express: requests carried from socket to socket, see express.c. TCP sequence numbers are compared for equality alone */

#define PL_X_SLOTS 8           /* endpoints of one program, upstreams of one pair */
#define PL_X_HEAD_BYTES 1024   /* of a head that is looked at, and saved for a retry */
#define PL_X_BODY_BYTES 65536  /* of a request's body */
#define PL_X_BUDGET_BYTES 262144 /* of a response, head and body: what the kernel may hold for a reader that sleeps */
#define PL_X_STATES 8192       /* of one block: a table lies within one, and its states are numbered in there */
#define PL_X_BLOCKS 2
#define PL_X_PROGRAMS 4096
#define PL_X_BUCKETS 224
#define PL_X_NO_SLOT 0xffffffff

/* The four sockets of a pair: the application's and the proxy's towards it, the proxy's and the server's; the two of a leg */
enum pl_xside { PL_X_CLIENT = 1, PL_X_SERVER, PL_X_ACCEPTED, PL_X_UPSTREAM, PL_X_LEG_APP, PL_X_LEG_PROXY };

/* xlegs: HASH by id, random and never reused: what the agent forgets goes by TCP from then on. Its memory is given again at once,
 * while a program may look at it still: nothing here says whose socket gets bytes. An end by the lowest bit of its side. clean:
 * bit 32 | its rcv_nxt when it was last seen with all read; waiting: what was handed to it since. off: for good */
struct pl_xlegend { u64 clean; u32 waiting, pad; };
struct pl_xleg { struct pl_xlegend ends[2]; u32 off, pad; };

/* Where the table goes over eight bytes of a head, as the socket sent them last in that place: from `from` to `to`, with no
 * action on the way. So while the program has this stamp. */
struct pl_xstep { u32 stamp; u16 from, to; };
#define PL_X_STEPS 64

/* xverdicts: HASH; no entry: user space decides. upto: cumulated weights; mask: of endpoints */
struct pl_xverdict_key { u32 program; u16 rule, seen; };
struct pl_xgroup { u32 upto, mask; };
struct pl_xverdict { u32 name, total; struct pl_xgroup group[4]; };

/* xends: SK_STORAGE on all four. key: of an application's socket in the sockhash, its own for life. settled: every reader of
 * the socket knows of redirected bytes. What follows is written by the socket's own program, under the socket's lock. reg: of
 * the table's last run, by pl_xaction; words, steps: what it went over. That was a whole head, and the same again would come
 * out the same, while the program has the stamp `whole`; tail: the head's last bytes. So for `verdict`, with the stamp
 * `judged`. saved: the record that has this head. */
struct pl_xend {
  u64 record, key;
  u32 side, slot, settled, place, pad, spare; /* place: of the record */
  u64 peer; /* of a leg's: the key of the other end */
  u32 reg[8];
  u32 whole, judged;
  u64 saved, tail[2];
  struct pl_xverdict verdict;
  u64 words[PL_X_HEAD_BYTES / 8];
  struct pl_xstep steps[PL_X_STEPS];
};

/* clean: bit 32 | rcv_nxt of the server's socket, when it was last seen with all read. up_seq, srv_seq: where the proxy's
 * socket stands, by its last arm, in what it wrote and read; base_out, base_in: at pairing. dirty: wrote unasked. */
struct pl_xslot { u64 key, clean; u32 workload, port, up_seq, srv_seq, base_in, base_out, dirty, pad; };

/* A thread, and by what to tell whether it is inside send() still: addresses of the socket's references and of three fields of
 * the task. changes: how often another one took its place; seen: PL_X_SEEN + the time that seen_task had run outside the kernel when
 * it was looked at, less: it was not, or has sent since */
#define PL_X_SEEN 2
struct pl_xthread { u64 task, refs_at, state_at, tid_at, ran_at, seen, seen_task; u32 tid, changes; };

/* xrecords: ARRAY; a place is given again once no program that may know its last record runs. One client's connection and the
 * upstreams it may use. id: random, never reused; 0: an empty place. */
#define PL_X_RECORDS 20480
enum pl_xphase { PL_XP_IDLE, PL_XP_REQUEST, PL_XP_HEAD, PL_XP_BODY };
struct pl_xrecord {
  u64 id;
  /* What an exchange changes on both sides, in one line of the CPUs' caches: each line would come and go with each message */
  u32 busy, phase, handed, handed_at;         /* busy: slot + 1 of the one that was asked */
  u32 name, rule, status, method_head, req_left, req_bytes, resp_left, resp_bytes;
  u64 t0_ns, done_ns;                         /* CLOCK_BOOTTIME */
  /* What it mostly reads alone */
  u64 client_key, counted;                    /* counted: 1 + its place in xloads, while it is counted there */
  u32 program, off, hold;                     /* off: for good; hold: until armed again */
  u32 armed, arm_up, arm_down;                /* of the accepted socket, as in pl_xslot */
  u32 last, refs;                             /* slot + 1 asked last; fewest references seen on the client's socket */
  u32 split, punt;                            /* split: a request that came in parts; punt: pl_xreason of the last one */
  u32 head_len, identity;
  struct pl_xthread sender, answerer;         /* whose send() carried something last, from the client and from a server */
  u32 base_in, base_out;                      /* of the accepted socket */
  struct pl_xslot slots[PL_X_SLOTS];
  u32 place, spare[11];                       /* spare: for all records to lie alike in lines */
};

/* xheads: HASH u64 id -> where the record is, and the head of its last request that was carried */
struct pl_xhead { u32 place, pad; u8 bytes[PL_X_HEAD_BYTES]; };

/* What getsockopt(PL_OPT_EXPRESS) answers. handed_slow: bytes that server wrote before, unasked. flags: pl_xflag. head: its
 * start, so that all is no more than the 1,024 bytes that Python's getsockopt takes */
#define PL_X_VIEW_HEAD_BYTES 952
/* INSIDE: somebody may be inside the client's send() still, and what he sends on its way; TORN: part of a request;
 * ANSWERING: a server's, with the end of the last answer */
enum pl_xflag { PL_XF_OFF = 1, PL_XF_HOLD = 2, PL_XF_INSIDE = 4, PL_XF_TORN = 8, PL_XF_ANSWERING = 16 };
struct pl_xview {
  u64 record;
  u32 flags, armed, busy, phase, handed, handed_slow, rule, status, method_head, head_len, req_left, resp_left, resp_bytes, punt;
  u64 t0_ns;
  u8 head[PL_X_VIEW_HEAD_BYTES];
};

/* What setsockopt(PL_OPT_EXPRESS) takes. Bytes are counted from the pairing on; slot PL_X_NO_SLOT: the client's part alone */
enum pl_xarm_op { PL_X_ARM = 1, PL_X_HOLD, PL_X_TAKE };
struct pl_xarm { u32 op, slot, consumed, sent, up_sent, up_consumed, pad[2]; };

/* xprograms: ARRAY. Valid under one generation alone. sample: so many of 65536 go to user space. stamp: no other has it, nor
 * has this entry for other tables; entry 0, which is no program, has the last one given. Slot i of a record is endpoint i. */
struct pl_xprogram {
  u32 generation, root, response, service, nendpoints, sample;
  u32 rate_per_s, burst; /* requests; rate 0: no limit */
  u32 endpoints[PL_X_SLOTS]; /* workload ids */
  u32 stamp, chooses; /* chooses: some verdict leads to several endpoints, whose load counts */
};

/* A state as the compiler hands it over. 0: user space decides; 1: the head is complete. Bit 15 of next: do the row's action */
struct pl_xrow { u16 next[256]; u16 kind, value; u32 pad; };
/* xrows, xacts: ARRAY of blocks, mapped into the agent: u16 next[PL_X_STATES][256], what each step reads, and apart from it
 * struct pl_xact[PL_X_STATES], what few need. A root's upper bits name the block. 4 MiB: older kernels take no larger value. */
struct pl_xact { u16 kind, value; };
enum pl_xaction {
  PL_XA_NONE, PL_XA_RULE, /* = value; bit 15: the method is HEAD */
  PL_XA_ONCE,             /* |= value; set already: user space decides */
  PL_XA_DIGIT, PL_XA_MATCH, /* of the length; |= value */
  PL_XA_STATUS
};
enum pl_xonce { PL_XO_HOST = 1, PL_XO_LENGTH = 2 };

/* xstats: PERCPU_HASH. bytes_in: of requests, bytes_out: of responses, heads and bodies. Buckets: log-linear, see express.h */
struct pl_xstat_key { u32 program; u16 name, status; };
struct pl_xstat { u64 requests, bytes_in, bytes_out, ns, buckets[PL_X_BUCKETS]; };

/* xnexts: LRU_HASH by socket cookie. next: TCP's own byte that comes next; broken: one was lost, no more of them */
struct pl_xnext { u32 next, broken; };

/* xcounters: PERCPU_ARRAY u64. Why a request went to user space, or a response was handed over. */
enum pl_xreason {
  PL_XR_CARRIED, PL_XR_NO_RECORD, PL_XR_OFF, PL_XR_HOLD, PL_XR_NOT_ARMED, PL_XR_UNSETTLED, PL_XR_GENERATION, PL_XR_LEASE,
  PL_XR_PIPELINED, PL_XR_BEHIND, PL_XR_UNREAD, PL_XR_HEAD, PL_XR_VERDICT, PL_XR_SAMPLE, PL_XR_RATE, PL_XR_BODY, PL_XR_NO_SLOT,
  PL_XR_DIRTY, PL_XR_UNCLEAN, PL_XR_TARGET_GONE, PL_XR_RESPONSE_HEAD, PL_XR_RESPONSE_STATUS, PL_XR_RESPONSE_BUDGET,
  PL_XR_EARLY, PL_XR_SURPLUS, PL_XR_UNASKED, PL_XR_STAT_FULL, PL_XR_HANDED, PL_XR_ANSWERED, PL_XR_HEAD_LONG, PL_XR_HEAD_PART,
  PL_XR_SENT_AGAIN, PL_XR_SENT_AGAIN_LOST, /* not of requests: bytes that TCP brought twice, cut off or the connection's end */
  PL_XR_INSIDE,
  PL_XR_LEG, PL_XR_LEG_UNREAD, PL_XR_LEG_LONG, /* of a leg's messages: handed over, or why not */
  PL_XR_COUNT
};

/* What the agent asks of express_control.c, and its answers. local, remote: of the proxy's socket; caller: what the server
 * was shown. key: in, for a socket that has none; out, the one it has. */
enum pl_xop_kind { PL_XK_ENROL = 1, PL_XK_CHECK, PL_XK_FORGET, PL_XK_SETTLE, PL_XK_PROGRAM, PL_XK_LEG, PL_XK_SETTLE_LEG };
struct pl_xop {
  u32 kind, side;
  u64 record, key;
  u32 slot, identity, family, workload, program, pad;
  struct pl_addr local, remote, caller;
  u16 local_port, remote_port, caller_port, port;
};
enum pl_xresult {
  PL_XQ_MALFORMED = 64, PL_XQ_OK, PL_XQ_NO_RECORD, PL_XQ_NO_PROXY_SOCKET, PL_XQ_NO_APP_SOCKET, PL_XQ_NOT_ESTABLISHED,
  PL_XQ_NOT_THE_PROXYS, PL_XQ_NOT_CAPTURED, PL_XQ_IDENTITY, PL_XQ_CALLER, PL_XQ_LOWAT, PL_XQ_ULP, PL_XQ_NO_STORAGE, PL_XQ_REFUSED,
  PL_XQ_NOT_YET, PL_XQ_MOVED, PL_XQ_UNREAD, PL_XQ_PEEK_OFF, PL_XQ_ZEROCOPY, PL_XQ_PAIRED,
};

/* Only so that the compiler describes what no map's key or leaf names */
struct pl_shapes { struct pl_event event; struct pl_xview xview; struct pl_xarm xarm; struct pl_xop xop; };

_Static_assert(sizeof(struct pl_config) == 40, "pl_config");
_Static_assert(sizeof(struct pl_member) == 24, "pl_member");
_Static_assert(sizeof(struct pl_dest_key) == 20 && sizeof(struct pl_dest) == 16, "pl_dest");
_Static_assert(sizeof(struct pl_backend_key) == 8 && sizeof(struct pl_backend) == 24, "pl_backend");
_Static_assert(sizeof(struct pl_policy_key) == 12 && sizeof(struct pl_policy) == 8, "pl_policy");
_Static_assert(sizeof(struct pl_dial_key) == 32, "pl_dial_key");
_Static_assert(sizeof(struct pl_egress_key) == 20 && sizeof(struct pl_egress) == 24, "pl_egress");
_Static_assert(sizeof(struct pl_grant_key) == 32 && sizeof(struct pl_grant) == 16, "pl_grant");
_Static_assert(sizeof(struct pl_origin) == 64 && sizeof(struct pl_caller) == 24, "pl_origin, pl_caller");
_Static_assert(sizeof(struct pl_flow) == 48 && sizeof(struct pl_arrival) == 80, "pl_flow, pl_arrival");
_Static_assert(sizeof(struct pl_usage) == 16, "pl_usage");
_Static_assert(sizeof(struct pl_conn) == 64, "pl_conn");
_Static_assert(sizeof(struct pl_event) == 72, "pl_event");
_Static_assert(sizeof(struct pl_peer) == 68 && sizeof(struct pl_peers) == 8 + PL_PEERS * 68, "pl_peer");
_Static_assert(PL_R_COUNT <= PL_COUNTERS, "counters");
_Static_assert(sizeof(struct pl_xend) == 152 + PL_X_HEAD_BYTES + 8 * PL_X_STEPS && sizeof(struct pl_xslot) == 48, "pl_xend, pl_xslot");
_Static_assert(sizeof(struct pl_xthread) == 64 && sizeof(struct pl_xrecord) == 704, "pl_xrecord");
_Static_assert(sizeof(struct pl_xview) == 1024 && sizeof(struct pl_xarm) == 32, "pl_xview, pl_xarm");
_Static_assert(sizeof(struct pl_xrow) == 520 && sizeof(struct pl_xprogram) == 72, "pl_xrow, pl_xprogram");
_Static_assert(sizeof(struct pl_xverdict) == 40 && sizeof(struct pl_xstat_key) == 8, "pl_xverdict, pl_xstat_key");
