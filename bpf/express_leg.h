/* A leg: one connection between an application and the proxy. What one end says goes to the other's queue, without TCP between
 * them, while that is little; who decides about it is user space as before. Any bytes, any order of speaking: an end hands
 * over what it sends while the other has read all that ever came by TCP. The latch is arithmetic, as in express.c: bytes on
 * the ordinary way move `write_seq` past what the other has said it read, and nothing is handed over until it says so anew. */

#define LEG_BYTES_MAX 262144 /* handed over and not known to be read; what is more waits in TCP, which asks the sender to wait */
#define LEG_MESSAGE_BYTES 1024 /* what the kernel keeps of each message besides (struct sk_msg), and charges to nobody */

/* It makes what the other end has said old: once the numbers have gone round, it would be taken for new */
static inline int by_tcp(struct pl_xlegend *other, u32 reason)
{
  if (*(volatile u64 *)&other->clean)
    *(volatile u64 *)&other->clean = 0;
  xcount(reason);
  return SK_PASS;
}

static inline int from_leg(struct sk_msg_md *m, struct pl_xend *e, void *tp)
{
  struct pl_xleg *l = leg_of(e);
  struct pl_xlegend *own, *other;
  u32 n = m->size, costs = n + LEG_MESSAGE_BYTES, rcv;
  u64 clean, key;

  if (!l) {
    xcount(PL_XR_NO_RECORD);
    return SK_PASS;
  }
  own = &l->ends[e->side & 1];
  other = &l->ends[~e->side & 1];
  rcv = TCP_U32(tp, O_RCV_NXT);
  if (e->settled && all_read(tp)) {
    clean = clean_at(rcv);
    if (*(volatile u64 *)&own->clean != clean) /* mostly it is, and the line stays where it is in the CPUs' caches */
      *(volatile u64 *)&own->clean = clean;
    if (*(volatile u32 *)&own->waiting)
      *(volatile u32 *)&own->waiting = 0;
  }
  if (l->off) {
    xcount(PL_XR_OFF);
    return SK_PASS;
  }
  if (*(volatile u64 *)&other->clean != clean_at(TCP_U32(tp, O_WRITE_SEQ)))
    return by_tcp(other, PL_XR_LEG_UNREAD);
  if (n > LEG_BYTES_MAX || *(volatile u32 *)&other->waiting + costs > LEG_BYTES_MAX)
    return by_tcp(other, PL_XR_LEG_LONG);
  key = e->peer;
  if (!in_one_piece(m) || xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS)
    return by_tcp(other, PL_XR_TARGET_GONE);
  __sync_fetch_and_add(&other->waiting, costs);
  xcount(PL_XR_LEG);
  return SK_PASS;
}
