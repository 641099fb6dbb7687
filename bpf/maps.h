/* The maps. Pinned by the loader's path (PL_PINS), so that a new set of programs finds the old one's state.
 * No map here evicts: what is full refuses. Sizes are entries. */

#define PL_MAP(type, name, key, leaf, max, flags) BPF_TABLE_PINNED(type, key, leaf, name, max, PL_PINS #name, flags)
#define PL_SPARSE BPF_F_NO_PREALLOC

/* As BCC's own macros, but pinned */
#define PL_SK_STORAGE(_name, _leaf) \
struct _name##_table_t { \
  int key; \
  _leaf leaf; \
  void *(*sk_storage_get)(void *, void *, int); \
  int (*sk_storage_delete)(void *); \
  u32 flags; \
}; \
__attribute__((section("maps/sk_storage:" PL_PINS #_name))) \
struct _name##_table_t _name = { .flags = BPF_F_NO_PREALLOC }; \
BPF_ANNOTATE_KV_PAIR(_name, int, _leaf)

#define PL_RINGBUF(_name, _bytes) \
struct _name##_table_t { \
  int key; \
  u32 leaf; \
  int (*ringbuf_output)(void *, u64, u64); \
  void *(*ringbuf_reserve)(u64); \
  void (*ringbuf_discard)(void *, u64); \
  void (*ringbuf_submit)(void *, u64); \
  u32 max_entries; \
}; \
__attribute__((section("maps/ringbuf:" PL_PINS #_name))) \
struct _name##_table_t _name = { .max_entries = (_bytes) }

/* Written by the agent */
PL_MAP("array", config, u32, struct pl_config, 1, 0);
PL_MAP("hash", members, u64, struct pl_member, 16384, PL_SPARSE);
PL_MAP("hash", sources, u32, struct pl_source, 16384, PL_SPARSE);
PL_MAP("hash", dests, struct pl_dest_key, struct pl_dest, 262144, PL_SPARSE);
PL_MAP("hash", backends, struct pl_backend_key, struct pl_backend, 262144, PL_SPARSE);
PL_MAP("hash", policy, struct pl_policy_key, struct pl_policy, 524288, PL_SPARSE);
PL_MAP("hash", listeners, u64, u32, 4096, PL_SPARSE);
PL_MAP("hash", dials, struct pl_dial_key, u32, 262144, PL_SPARSE);
PL_MAP("lpm_trie", egress, struct pl_egress_key, struct pl_egress, 16384, PL_SPARSE);
PL_MAP("hash", grants, struct pl_grant_key, struct pl_grant, 65536, PL_SPARSE);

/* Written by the programs */
PL_MAP("hash", arriving, struct pl_flow, struct pl_arrival, 16384, 0);
PL_MAP("hash", usage, u32, struct pl_usage, 65536, PL_SPARSE);
PL_MAP("hash", datagrams, struct pl_flow, struct pl_datagram, 65536, PL_SPARSE);
PL_SK_STORAGE(origins, struct pl_origin);
PL_SK_STORAGE(callers, struct pl_caller);
PL_SK_STORAGE(conns, struct pl_conn);
PL_SK_STORAGE(peers, struct pl_peers);
PL_SK_STORAGE(xends, struct pl_xend);
PL_MAP("array", xrecords, u32, struct pl_xrecord, PL_X_RECORDS, 0);
PL_MAP("hash", xheads, u64, struct pl_xhead, PL_X_RECORDS, PL_SPARSE);
PL_MAP("hash", xlegs, u64, struct pl_xleg, 32768, PL_SPARSE);
PL_MAP("array", xloads, u32, u32, PL_X_PROGRAMS * PL_X_SLOTS, 0); /* asked and not answered, by program and slot */
PL_MAP("percpu_array", counters, u32, u64, PL_COUNTERS, 0);
PL_MAP("percpu_array", tolds, u32, struct pl_told, 1, 0);
PL_RINGBUF(events, 1 << 18);
PL_MAP("array", shapes, u32, struct pl_shapes, 1, 0);
